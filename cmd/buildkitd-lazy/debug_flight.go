package main

import (
	"fmt"
	"net/http"
	"runtime/trace"
	"sync"
	"time"
)

// flightRecorder keeps the last seconds of the runtime's execution trace, for /debug/flight.
type flightRecorder struct {
	mu       sync.Mutex
	period   time.Duration         // zero is the runtime's default
	recorder *trace.FlightRecorder // nil while stopped
}

func (f *flightRecorder) handle(m *http.ServeMux) {
	m.HandleFunc("POST /debug/flight/trace/start", f.start)
	m.HandleFunc("POST /debug/flight/trace/stop", f.stop)
	m.HandleFunc("POST /debug/flight/trace/set_period", f.setPeriod)
	m.HandleFunc("GET /debug/flight/trace", f.write)
}

func (f *flightRecorder) start(w http.ResponseWriter, _ *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.recorder != nil {
		http.Error(w, "flight recorder is already running", http.StatusConflict)
		return
	}
	r := trace.NewFlightRecorder(trace.FlightRecorderConfig{MinAge: f.period})
	if err := r.Start(); err != nil {
		http.Error(w, fmt.Sprintf("start flight recorder: %v", err), http.StatusInternalServerError)
		return
	}
	f.recorder = r
}

func (f *flightRecorder) stop(w http.ResponseWriter, _ *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.recorder == nil {
		http.Error(w, "flight recorder is not running", http.StatusConflict)
		return
	}
	f.recorder.Stop()
	f.recorder = nil
}

func (f *flightRecorder) setPeriod(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.recorder != nil {
		http.Error(w, "flight recorder is running, stop it to change its period", http.StatusPreconditionFailed)
		return
	}
	period, err := time.ParseDuration(r.FormValue("period"))
	if err != nil || period < 0 {
		http.Error(w, fmt.Sprintf("invalid flight recorder period %q", r.FormValue("period")), http.StatusBadRequest)
		return
	}
	f.period = period
}

func (f *flightRecorder) write(w http.ResponseWriter, _ *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.recorder == nil {
		http.Error(w, "flight recorder is not running", http.StatusConflict)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Disposition", `attachment; filename="trace"`)
	if _, err := f.recorder.WriteTo(w); err != nil {
		http.Error(w, fmt.Sprintf("write flight recording: %v", err), http.StatusInternalServerError)
	}
}
