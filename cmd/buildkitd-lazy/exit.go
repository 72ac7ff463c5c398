package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// exitStatuser is an error with an exit status of its own. That of others is 1.
type exitStatuser interface {
	error
	ExitStatus() int
}

func exitStatus(err error) int {
	if s, ok := errors.AsType[exitStatuser](err); ok {
		return s.ExitStatus()
	}
	return 1
}

// signalError is the cause of a context that a signal has ended.
type signalError struct{ syscall.Signal }

func (e signalError) Error() string { return fmt.Sprintf("stopped by signal %s", e.Signal) }

// ExitStatus implements exitStatuser, as a shell has it.
func (e signalError) ExitStatus() int { return 128 + int(e.Signal) }

// untilSignal returns a context that ends with the first SIGINT or SIGTERM; a second one ends the process, as if nobody had
// listened to them.
func untilSignal(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		select {
		case s := <-signals:
			signal.Stop(signals)
			cancel(signalError{s.(syscall.Signal)})
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		cancel(nil)
	}
}
