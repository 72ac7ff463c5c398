// Command quotes is a small web service: GET / answers one quote as JSON,
// GET /healthz answers 204. It uses only the standard library, so that it
// builds where there is no network.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

type quote struct {
	Text   string `json:"text"`
	Author string `json:"author"`
}

var quotes = []quote{
	{"Simplicity is prerequisite for reliability.", "Edsger W. Dijkstra"},
	{"A little copying is better than a little dependency.", "Rob Pike"},
	{"The cheapest, fastest, and most reliable components are those that aren't there.", "Gordon Bell"},
}

func newHandler(pick func(n int) int) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(quotes[pick(len(quotes))]); err != nil {
			slog.Error("write response", "err", err)
		}
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusNoContent)
	})
	return mux
}

func main() {
	addr := flag.String("addr", ":8080", "address to listen on")
	once := flag.Bool("once", false, "print one quote and exit")
	flag.Parse()
	if *once {
		q := quotes[rand.IntN(len(quotes))]
		fmt.Printf("%s (%s)\n", q.Text, q.Author)
		return
	}
	if err := serve(*addr); err != nil {
		slog.Error("serve", "addr", *addr, "err", err)
		os.Exit(1)
	}
}

func serve(addr string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	srv := &http.Server{Addr: addr, Handler: newHandler(rand.IntN), ReadHeaderTimeout: 5 * time.Second}
	failed := make(chan error, 1)
	go func() { failed <- srv.ListenAndServe() }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	stopping, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := srv.Shutdown(stopping); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
