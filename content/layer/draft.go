package layer

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/archive"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// Draft is a layer as a Store would hold it, made without one: payloads are hashed and forgotten, and
// what is left is the tree. It goes through the same steps as an ingest, so that it comes to the same ids.
type Draft struct {
	DiffID  content.DiffID // zero for a directory
	TarSize int64          // 0 for a directory
	Exact   DraftTree      // under content.Exact
	Python  DraftTree      // under content.Python
}

// DraftTree is the tree of a Draft under one fidelity.
type DraftTree struct {
	ID      content.LayerID
	Payload content.PayloadDigest
	// File are the bytes of the tree file, but for what only an ingest knows: what it added to the disk.
	File []byte
}

// Entries decodes the tree.
func (t DraftTree) Entries() ([]*content.Entry, error) {
	_, entries, err := tree.Decode(t.File, t.ID)
	return entries, err
}

// DraftBlob drafts the layer of a blob, which is read to its end. Its digest is noted in the trees; it
// is not verified.
func DraftBlob(ctx context.Context, blob digest.Digest, r io.Reader) (Draft, error) {
	plain, err := archive.Decompress(r, nil)
	if err != nil {
		return Draft{}, fmt.Errorf("read blob %s: %w", blob, err)
	}
	defer plain.Close()
	st, d := newStream(plain), newDrafter(nil)
	var entries []*content.Entry
	err = safely(func() (err error) {
		entries, err = archive.ReadTar(ctx, st, d, nil)
		return err
	})
	if err := st.finish(err); err != nil {
		return Draft{}, fmt.Errorf("read blob %s: %w", blob, err)
	}
	out, err := d.draft(entries, &tree.Tar{DiffID: st.diffID, Size: st.size, Blobs: []digest.Digest{blob}})
	if err != nil {
		return Draft{}, fmt.Errorf("draft the layer of blob %s: %w", blob, err)
	}
	return out, nil
}

// DraftDir drafts the layer of an overlay's upper directory. diffID is what it was unpacked from, zero when
// that is not known. read is told how many bytes of payloads were read; it may be nil.
func DraftDir(ctx context.Context, upper string, diffID content.DiffID, read func(bytes int64)) (Draft, error) {
	d := newDrafter(read)
	entries, err := archive.ReadDir(ctx, upper, "", d, nil)
	if err != nil {
		return Draft{}, err
	}
	var t *tree.Tar
	if !diffID.IsZero() {
		t = &tree.Tar{DiffID: diffID, Blobs: []digest.Digest{diffID.Digest()}}
		for _, e := range entries {
			t.Size += e.Size
		}
	}
	out, err := d.draft(entries, t)
	if err != nil {
		return Draft{}, fmt.Errorf("draft the layer of %s: %w", upper, err)
	}
	out.TarSize = 0
	return out, nil
}

// drafter names payloads as a session under content.Exact does, and forgets them.
type drafter struct {
	read func(int64)
	buf  []byte
	pyc  map[*content.Entry]pyc
}

func newDrafter(read func(int64)) *drafter {
	if read == nil {
		read = func(int64) {}
	}
	return &drafter{read: read, buf: make([]byte, chunkSize), pyc: map[*content.Entry]pyc{}}
}

// Put implements archive.Payloads.
func (d *drafter) Put(e *content.Entry, r io.Reader) error {
	head := d.buf[:min(e.Size, int64(len(d.buf)))]
	if _, err := io.ReadFull(r, head); err != nil {
		return err
	}
	header, isPyc := content.PycHeader{}, false
	if strings.HasSuffix(e.Path, ".pyc") {
		header, isPyc = content.ParsePyc(head)
	}
	p := pyc{header: header}
	if e.Size <= content.InlineMax {
		e.Data = slices.Clone(head)
		d.read(e.Size)
	} else {
		exact, canonical := sha256.New(), hash.Hash(nil)
		exact.Write(head)
		if isPyc {
			content.SetPycTime(head, content.PycTime)
			canonical = sha256.New()
			canonical.Write(head)
		}
		d.read(int64(len(head)))
		if err := d.rest(e.Size-int64(len(head)), r, exact, canonical); err != nil {
			return err
		}
		exact.Sum(e.Object.Sum[:0])
		if isPyc {
			canonical.Sum(p.canonical.Sum[:0])
		}
	}
	if isPyc {
		d.pyc[e] = p
	}
	return nil
}

// rest hashes what follows the head of a payload.
func (d *drafter) rest(size int64, r io.Reader, exact, canonical hash.Hash) error {
	for size > 0 {
		n, err := io.ReadFull(r, d.buf[:min(size, int64(len(d.buf)))])
		if err != nil {
			return err
		}
		exact.Write(d.buf[:n])
		if canonical != nil {
			canonical.Write(d.buf[:n])
		}
		d.read(int64(n))
		size -= int64(n)
	}
	return nil
}

// draft encodes the trees. t is nil where nothing is known of a tar.
func (d *drafter) draft(entries []*content.Entry, t *tree.Tar) (out Draft, err error) {
	if t != nil {
		out.DiffID, out.TarSize = t.DiffID, t.Size
	}
	canonical, err := settlePython(content.Exact, entries, d.pyc, nil) // which restores nothing
	if err != nil {
		return out, err
	}
	if out.Exact, err = draftTree(content.Exact, entries, canonical, t); err != nil {
		return out, err
	}
	python, found, restore := d.asPython(entries)
	if canonical, err = settlePython(content.Python, python, found, restore); err != nil {
		return out, err
	}
	out.Python, err = draftTree(content.Python, python, canonical, t)
	return out, err
}

// asPython returns copies of the entries as a session under content.Python has them when a tar was read: every
// timestamp .pyc has the canonical timestamp, and restore takes it back.
func (d *drafter) asPython(entries []*content.Entry) (copies []*content.Entry, found map[*content.Entry]pyc, restore func(*content.Entry, pyc) error) {
	copies = make([]*content.Entry, len(entries))
	found = map[*content.Entry]pyc{}
	exact := map[*content.Entry]content.ObjectID{}
	for i, e := range entries {
		c := *e
		copies[i] = &c
		p, ok := d.pyc[e]
		if !ok {
			continue
		}
		found[&c], exact[&c] = p, e.Object
		if c.Object = p.canonical; c.Data != nil {
			c.Data = slices.Clone(c.Data)
			content.SetPycTime(c.Data, content.PycTime)
		}
	}
	return copies, found, func(e *content.Entry, p pyc) error {
		if e.Object = exact[e]; e.Data != nil {
			content.SetPycTime(e.Data, p.header.Mtime)
		}
		return nil
	}
}

func draftTree(f content.Fidelity, entries []*content.Entry, canonical map[*content.Entry]content.Entry, t *tree.Tar) (DraftTree, error) {
	enc := tree.Encode(f, entries)
	facts := tree.Facts{Fidelity: f, Payload: tree.PayloadDigest(entries, canonical), Entries: int64(len(entries))}
	for _, e := range entries {
		facts.Bytes += e.Size
	}
	facts.UsedBytes, facts.UsedInodes = facts.Bytes, facts.Entries // as many digits
	if t != nil {
		own := *t
		own.Fidelity = f
		facts.Tars = []tree.Tar{own}
	}
	file, err := enc.Marshal(facts)
	return DraftTree{ID: enc.ID, Payload: facts.Payload, File: file}, err
}
