package recipe

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"path/filepath"
	"slices"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/archive"
)

// Blob is what a recipe is made of.
type Blob struct {
	Sum     content.Sum // sha256
	Size    int64
	TarSize int64
	// Open may be called several times.
	Open Opener
}

const (
	// keptContent is the longest content of a member that a recipe has as a literal, where the layer does not have it.
	keptContent = 1 << 20
	// A recipe may take half of what its blob takes; a small one more.
	smallRecipe = 64 << 10
)

// Stats are what a recipe has of a tar.
type Stats struct {
	Payloads int64 // members whose content is in the layer
	Stamped  int64 // of these, with another timestamp of Python's
	Literal  int64 // bytes of the tar that are in the recipe, uncompressed
	Kept     int64 // of these, content that the layer does not have
}

// Make writes the recipe of a blob of this layer to w. It compares little: whoever keeps the recipe follows it once
// before (Build). memory is told of what decompressing takes.
func Make(ctx context.Context, w io.Writer, b Blob, l Layer, memory archive.Memory) (Stats, error) {
	f, err := find(ctx, b.Open, memory)
	if err != nil {
		return Stats{}, err
	}
	h := Header{Blob: b.Sum, Size: b.Size, TarSize: b.TarSize, Layer: l.ID, Encoder: f.Name, Head: f.head}
	if h.Fingerprint, err = f.Fingerprint(); err != nil {
		return Stats{}, err
	}
	plain, closeAll, err := decompressed(b.Open, memory)
	if err != nil {
		return Stats{}, err
	}
	defer closeAll()
	return write(ctx, &bounded{w: w, left: max(smallRecipe, b.Size/2)}, h, plain, l)
}

// bounded refuses to write more than a recipe may take.
type bounded struct {
	w    io.Writer
	left int64
}

func (b *bounded) Write(p []byte) (int, error) {
	if b.left -= int64(len(p)); b.left < 0 {
		return 0, fmt.Errorf("%w: its recipe takes half of its space", ErrTooLarge)
	}
	return b.w.Write(p)
}

// Tar writes what a recipe has of a tar, with an empty header: for a measurement.
func Tar(ctx context.Context, w io.Writer, r io.Reader, l Layer) (Stats, error) {
	return write(ctx, w, Header{TarSize: -1}, r, l)
}

func write(ctx context.Context, w io.Writer, h Header, r io.Reader, l Layer) (Stats, error) {
	out, err := newOutput(w)
	if err != nil {
		return Stats{}, err
	}
	s := &splitter{ctx: ctx, out: out, l: l, payloads: l.payloads(), raw: &tap{r: r},
		buf: make([]byte, chunk), last: -1}
	if err := errors.Join(out.header(h), s.run()); err != nil {
		return s.stats, errors.Join(err, out.z.Close())
	}
	if h.TarSize >= 0 && s.raw.n != h.TarSize {
		return s.stats, errors.Join(fmt.Errorf("tar of blob %s: %d bytes, not %d", h.Blob.Digest(), s.raw.n, h.TarSize),
			out.z.Close())
	}
	return s.stats, out.end()
}

// tap hands every byte of a tar to sink as it is read.
type tap struct {
	r    io.Reader
	n    int64
	sink io.Writer
}

func (t *tap) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	t.n += int64(n)
	if n > 0 {
		if _, werr := t.sink.Write(p[:n]); werr != nil {
			return n, werr
		}
	}
	return n, err
}

// splitter takes a tar apart. archive/tar reads no further than it has to, so that what it has read up to a member's
// content is a literal.
type splitter struct {
	ctx      context.Context
	out      *output
	l        Layer
	payloads []*content.Entry
	bySum    map[content.Sum]int // made when it is first needed
	raw      *tap
	buf      []byte
	kept     []byte // what the content of the last member was kept in
	stats    Stats
	last     int // the payload before
}

// Write takes a literal.
func (s *splitter) Write(p []byte) (int, error) {
	s.stats.Literal += int64(len(p))
	return s.out.Write(p)
}

func (s *splitter) run() error {
	s.raw.sink = s
	tr := tar.NewReader(s.raw)
	for {
		if s.ctx.Err() != nil {
			return context.Cause(s.ctx)
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return copyAll(s.ctx, io.Discard, s.raw) // what follows the end
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return fmt.Errorf("read tar: %w", err)
		}
		if h.Size == 0 || sparse(h) {
			continue // what there is of a sparse file's content becomes a literal as the next header is read
		}
		if err := s.member(tr, h); err != nil {
			return fmt.Errorf("%q: %w", h.Name[:min(len(h.Name), 256)], err)
		}
	}
}

// sparse reports whether a member's content stands in the tar in another way than it is stored.
func sparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// member reads the content of one, and finds it in the layer.
func (s *splitter) member(tr *tar.Reader, h *tar.Header) error {
	n, e := s.byPath(h)
	c := &contentOf{sum: sha256.New(), kept: s.kept[:0]}
	defer func() { s.kept = c.kept }()
	if e != nil && e.Size == h.Size {
		c.expect(e, s.l)
	}
	s.raw.sink = c
	for {
		if s.ctx.Err() != nil {
			return context.Cause(s.ctx)
		}
		_, err := tr.Read(s.buf)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	s.raw.sink = s
	if c.n == 0 {
		return nil // a header that declares a size and has no content
	}
	sum := content.Sum(c.sum.Sum(nil))
	switch {
	case c.want == sum:
		return s.payload(n, nil)
	case c.stamped != nil && c.want == content.Sum(c.stamped.Sum(nil)):
		s.stats.Stamped++
		return s.payload(n, c.head[8:12])
	}
	if n, ok := s.find(sum); ok {
		return s.payload(n, nil)
	}
	if c.n > keptContent {
		return fmt.Errorf("%w: nor are these %d bytes", ErrTooLarge, c.n)
	}
	s.stats.Kept += c.n
	_, err := s.Write(c.kept)
	return err
}

func (s *splitter) payload(n int, stamp []byte) error {
	s.stats.Payloads++
	s.last = n
	return s.out.payload(n, stamp)
}

// byPath finds the payload of the member's name, if the name leads to one without symbolic links.
func (s *splitter) byPath(h *tar.Header) (n int, e *content.Entry) {
	path := strings.TrimPrefix(filepath.Clean(h.Name), "/")
	if next := s.last + 1; next < len(s.payloads) && s.payloads[next].Path == path {
		return next, s.payloads[next]
	}
	_, e = search(s.l.Entries, path)
	if e != nil && e.Kind == content.Hardlink {
		path = e.Target
	}
	return search(s.payloads, path)
}

// search finds an entry by its path, or returns nil.
func search(entries []*content.Entry, path string) (int, *content.Entry) {
	n, found := slices.BinarySearchFunc(entries, path, func(e *content.Entry, path string) int {
		return content.ComparePaths(e.Path, path)
	})
	if !found {
		return 0, nil
	}
	return n, entries[n]
}

// find finds a payload by its sum.
func (s *splitter) find(sum content.Sum) (int, bool) {
	if s.bySum == nil {
		s.bySum = make(map[content.Sum]int, len(s.payloads))
		for n, e := range s.payloads {
			s.bySum[sumOf(e)] = n
		}
	}
	n, ok := s.bySum[sum]
	return n, ok
}

func sumOf(e *content.Entry) content.Sum {
	if e.Object.IsZero() {
		return sha256.Sum256(e.Data)
	}
	return e.Object.Sum
}

// contentOf takes the content of a member as it stands in the tar.
type contentOf struct {
	n    int64
	sum  hash.Hash
	kept []byte // all of it, if it is no longer than keptContent
	head []byte // the first bytes, until they are a bytecode's header
	want content.Sum
	// stamp is what the layer's bytecode records; nil for other content. stamped is the sum with it.
	stamp   []byte
	stamped hash.Hash
}

// expect notes what the layer has under the member's name.
func (c *contentOf) expect(e *content.Entry, l Layer) {
	c.want = sumOf(e)
	if e.Flags&content.PycPaired == 0 || e.Size < content.PycHeaderLen {
		return
	}
	head := make([]byte, content.PycHeaderLen)
	if l.readAt(e, head, 0) == nil {
		c.stamp, c.stamped = head[8:12], sha256.New()
	}
}

func (c *contentOf) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	c.sum.Write(p)
	if c.n <= keptContent {
		c.kept = append(c.kept, p...)
	}
	if c.stamped == nil {
		return len(p), nil
	}
	n := len(p)
	if more := content.PycHeaderLen - len(c.head); more > 0 {
		c.head = append(c.head, p[:min(more, len(p))]...)
		p = p[min(more, len(p)):]
		if len(c.head) < content.PycHeaderLen {
			return n, nil
		}
		head := bytes.Clone(c.head)
		copy(head[8:12], c.stamp)
		c.stamped.Write(head)
	}
	c.stamped.Write(p)
	return n, nil
}
