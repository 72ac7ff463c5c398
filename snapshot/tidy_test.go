package snapshot

import "testing"

// Between its end and its leaving the engine's list, a layer has no tree any more that could rest.
func TestRestWhileALayerIsClosed(t *testing.T) {
	l := layerOf(t, map[string][]byte{"file": []byte("x")})
	reg := newRegistry(t, nil, l)
	r := newReopenable(t, reg.options(DoorFUSE))
	r.lazily(reg, "base", "", l)
	e := r.door
	s := e.opened(l.digest)
	if err := r.Remove(t.Context(), "base"); err != nil {
		t.Fatal(err)
	}
	if err := r.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s.held.Model() != nil {
		t.Fatal("the store has the tree of a layer that was removed")
	}
	e.mu.Lock()
	e.layers[s.key] = s
	e.mu.Unlock()
	e.rest()
	e.mu.Lock()
	delete(e.layers, s.key)
	e.mu.Unlock()
}
