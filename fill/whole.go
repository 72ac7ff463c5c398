package fill

import "errors"

// A registry that has stopped to serve ranges sends the blob from its start, and all that is in front of a range is received for nothing. So what
// nobody waits for has no request of its own as long as it does: of a layer that is fetched in the background the bytes would be the square.
// What is behind something that somebody waits for comes along with that.

// errWhole is why something isn't fetched that nobody waits for.
var errWhole = errors.New("the registry sends the whole blob")

// answered takes note of whether a request was answered by the whole blob.
func (f *Filler) answered(whole bool) {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	if f.whole = whole; !whole {
		return
	}
	for _, fl := range f.flights {
		if fl.state == queued && fl.level > ahead { // of those read ahead there are few, and a long read waits for some
			f.drop(fl, errWhole)
		}
	}
}
