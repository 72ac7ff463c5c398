package fill

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// stack is an image of several layers behind one link.
func stack(t testing.TB, l *link, opt SchedulerOptions, layers ...*image) []*lab {
	t.Helper()
	s := NewScheduler(opt)
	labs := make([]*lab, len(layers))
	fillers := make([]*Filler, len(layers))
	for i, im := range layers {
		b := &lab{s: s, im: im, link: l, from: l.serve(im), sink: newMemory(im)}
		b.Filler = s.Open(im.Layer, b.from, b.sink, LayerOptions{Name: "sha256:test"})
		labs[i], fillers[i] = b, b.Filler
	}
	s.Join(fillers...)
	return labs
}

// dirOf makes a layer of a directory with files of a size in it, named 0000, 0001 and so on.
func dirOf(t testing.TB, dir string, files, size int) *image {
	t.Helper()
	var entries []entry
	for i := range files {
		entries = append(entries, text(fmt.Sprintf("%s/%04d", dir, i), size))
	}
	return treeOf(t, entries...)
}

// readPath reads a file.
func (b *lab) readPath(t testing.TB, name string) {
	t.Helper()
	i, err := b.im.Lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	b.read(t, b.im.Inodes[i].Data, b.im.Inodes[i].Size)
}

// A walk goes through a directory of one layer after the other, and comes back to each with the next directory.
func TestWalkThroughManyLayersReadsAtLinkSpeed(t *testing.T) {
	const dirs, files = 20, 30
	name := func(layer, dir, i int) string { return fmt.Sprintf("usr/%02d/%d-%02d", dir, layer, i) }
	var layers []*image
	total := int64(0)
	for k := range 6 {
		var entries []entry
		for dir := range dirs {
			for i := range files {
				size := 6000 + 500*k
				if (dir*files+i)%20 == k {
					size = 200_000 // too large to be fetched on the chance that it's read
				}
				entries = append(entries, text(name(k, dir, i), size))
			}
		}
		im := treeOf(t, entries...)
		layers = append(layers, im)
		total += int64(len(im.blob))
	}
	synctest.Test(t, func(t *testing.T) {
		l := &link{rate: 10e6, rtt: 20 * time.Millisecond}
		labs := stack(t, l, SchedulerOptions{}, layers...)
		defer labs[0].s.Close()
		start := time.Now()
		for dir := range dirs {
			for _, k := range []int{0, 5, 4, 3, 2, 1} { // as overlayfs lists them
				for i := range files {
					labs[k].readPath(t, name(k, dir, i))
				}
			}
		}
		d, ideal := time.Since(start), l.takes(total)
		t.Logf("%s, %.0f %% of the link", d, 100*ideal.Seconds()/d.Seconds())
		if d > ideal*100/95 {
			t.Errorf("took %s, the link alone %s", d, ideal)
		}
		for _, b := range labs {
			b.sink.once(t)
			b.fetchedOnce(t)
		}
	})
}

// Who walks slower than the link carries frees room for one small file after the other. They don't make a request each.
func TestSlowWalkMakesFewRequests(t *testing.T) {
	im := imageOf(t, 4<<20, many(2000, 4000)...)
	synctest.Test(t, func(t *testing.T) {
		l := dsl()
		b := stack(t, l, SchedulerOptions{}, im)[0]
		defer b.s.Close()
		start := time.Now()
		for i := range 2000 {
			b.readFile(t, i)
			time.Sleep(time.Millisecond)
		}
		requests, _, sent := l.figures()
		d, alone := time.Since(start), 2*time.Second
		t.Logf("%s, %d requests for %d bytes", d, requests, sent)
		if requests > 200 {
			t.Errorf("%d requests for %d bytes", requests, sent)
		}
		if d > alone*110/100 {
			t.Errorf("took %s, the walk alone %s", d, alone)
		}
	})
}

// Who reads a lot in order and then something else has little of the rest fetched, and not of layers that nobody has read.
func TestWalkThatEndsLeavesLittleUnread(t *testing.T) {
	layers := []*image{dirOf(t, "a", 4000, 10_000), dirOf(t, "b", 4000, 10_000), dirOf(t, "c", 100, 10_000)}
	synctest.Test(t, func(t *testing.T) {
		l := dsl()
		labs := stack(t, l, SchedulerOptions{}, layers...)
		defer labs[0].s.Close()
		a, b := labs[0], labs[1]
		b.readPath(t, "b/2000")
		for i := range 1000 {
			a.readPath(t, fmt.Sprintf("a/%04d", i))
		}
		time.Sleep(10 * time.Second)
		asked := int64(1000 * 10_000)
		if _, _, sent := l.figures(); sent > asked*22/10 {
			t.Errorf("sent %d bytes for %d", sent, asked)
		}
		if st := labs[2].Stats(); st.Requests > 0 {
			t.Errorf("%d requests for a layer that nobody has read", st.Requests)
		}
		// What is read in no order isn't taken for more of it.
		_, _, before := l.figures()
		for i := 3999; i > 1500; i -= 23 {
			b.readPath(t, fmt.Sprintf("b/%04d", i))
		}
		time.Sleep(10 * time.Second)
		if _, _, sent := l.figures(); sent-before > 2500/23*10_000*4 {
			t.Errorf("sent %d bytes for %d", sent-before, 2500/23*10_000)
		}
	})
}

// Who misses something while an image is swept waits for what is on its way, and not for what isn't yet.
func TestDemandIsNotDelayedBySweep(t *testing.T) {
	l := dsl()
	im, other := dirOf(t, "a", 6000, 10_000), dirOf(t, "b", 200, 10_000)
	synctest.Test(t, func(t *testing.T) {
		labs := stack(t, l, SchedulerOptions{}, im, other)
		defer labs[0].s.Close()
		done := make(chan struct{})
		go func() {
			defer close(done)
			for i := range 6000 {
				labs[0].readPath(t, fmt.Sprintf("a/%04d", i))
			}
		}()
		time.Sleep(500 * time.Millisecond)
		var worst time.Duration
		met := 0
		for i := 180; i >= 0; i -= 20 {
			time.Sleep(71 * time.Millisecond)
			name := fmt.Sprintf("b/%04d", i)
			if l.idle() || labs[1].has(t, name) {
				continue
			}
			met++
			start := time.Now()
			labs[1].readPath(t, name)
			worst = max(worst, time.Since(start))
		}
		t.Logf("at worst %s, %d times", worst, met)
		if met < 5 || worst > 4*l.rtt+l.takes(20_000) {
			t.Errorf("a read of 10 kB waited %s, %d times", worst, met)
		}
		<-done
	})
}

// A compiler reads all of one directory, then of another somewhere else. What is read ahead of it in an order that it hasn't isn't more for that.
func TestWhoReadsDirectoriesInNoOrderIsNotSweptFor(t *testing.T) {
	const dirs, files = 400, 30
	im := imageOf(t, 4<<20, many(dirs*files, 10_000)...)
	synctest.Test(t, func(t *testing.T) {
		b := stack(t, dsl(), SchedulerOptions{}, im)[0]
		defer b.s.Close()
		for k := range dirs / 8 {
			dir := k * 147 % dirs
			for i := dir * files; i < (dir+1)*files; i++ {
				b.readFile(t, i)
			}
		}
		time.Sleep(10 * time.Second)
		b.s.mu.Lock()
		defer b.s.mu.Unlock()
		if n, right := b.guessed[swept], b.right[swept]; n > 4<<20 {
			t.Errorf("swept %d bytes in vain, and %d that were read", n, right)
		}
	})
}

// A large file in the way of who has read little isn't swept in vain.
func TestLargeFileIsNotSweptBeforeMuchWasRead(t *testing.T) {
	const before, read = 150, 120
	im := imageOf(t, 4<<20, append(append(many(before, 10_000), 3_000_000), many(300, 10_000)...)...)
	synctest.Test(t, func(t *testing.T) {
		b := stack(t, dsl(), SchedulerOptions{}, im)[0]
		defer b.s.Close()
		for i := range read {
			b.readFile(t, i)
		}
		time.Sleep(10 * time.Second)
		if b.sink.Have(before) {
			t.Error("a large file was swept")
		}
	})
}
