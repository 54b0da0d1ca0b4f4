package layer

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
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
	defer d.close()
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
	defer d.close()
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

// drafter names payloads as a session under content.Exact does, and forgets them, but for compiled files of Python,
// which have other names once their sources are known.
type drafter struct {
	read func(int64)
	buf  []byte
	pyc  map[*content.Entry]pyc
	// kept holds the compiled files, at the offsets in at; nil when there is none. It has no name.
	kept *os.File
	end  int64
	at   map[*content.Entry]int64
}

func newDrafter(read func(int64)) *drafter {
	if read == nil {
		read = func(int64) {}
	}
	return &drafter{
		read: read, buf: make([]byte, chunkSize), pyc: map[*content.Entry]pyc{}, at: map[*content.Entry]int64{},
	}
}

func (d *drafter) close() error {
	if d.kept == nil {
		return nil
	}
	return d.kept.Close()
}

// Put implements archive.Payloads.
func (d *drafter) Put(e *content.Entry, r io.Reader) error {
	head := d.buf[:min(e.Size, int64(len(d.buf)))]
	if _, err := io.ReadFull(r, head); err != nil {
		return err
	}
	d.read(int64(len(head)))
	header, isPyc := content.PycHeader{}, false
	if strings.HasSuffix(e.Path, ".pyc") && e.Size <= bufferMax {
		header, isPyc = content.ParsePyc(head)
	}
	if e.Size <= content.InlineMax {
		e.Data = slices.Clone(head)
	} else {
		exact := sha256.New()
		to := io.Writer(exact)
		if isPyc {
			if err := d.keep(e); err != nil {
				return err
			}
			to = io.MultiWriter(exact, d.kept)
		}
		if err := d.rest(head, e.Size-int64(len(head)), r, to); err != nil {
			return err
		}
		exact.Sum(e.Object.Sum[:0])
	}
	if isPyc {
		d.pyc[e] = pyc{header: header, stamp: header.Mtime, canonical: e.Object}
	}
	return nil
}

// keep makes room for a payload.
func (d *drafter) keep(e *content.Entry) (err error) {
	if d.kept == nil {
		if d.kept, err = os.CreateTemp("", "dedup-draft-"); err != nil {
			return fmt.Errorf("keep compiled files: %w", err)
		}
		if err := os.Remove(d.kept.Name()); err != nil {
			return fmt.Errorf("keep compiled files: %w", err)
		}
	}
	d.at[e] = d.end
	d.end += e.Size
	return nil
}

// restamp names a payload that was kept, with another timestamp.
func (d *drafter) restamp(e *content.Entry, _ pyc, stamp uint32) (id content.ObjectID, err error) {
	buf := make([]byte, e.Size)
	if _, err := d.kept.ReadAt(buf, d.at[e]); err != nil {
		return id, fmt.Errorf("read compiled file: %w", err)
	}
	return canonicalID(buf, stamp), nil
}

// rest reads what follows the head of a payload, and hands all of it on.
func (d *drafter) rest(head []byte, size int64, r io.Reader, to io.Writer) error {
	if _, err := to.Write(head); err != nil {
		return err
	}
	for size > 0 {
		n, err := io.ReadFull(r, d.buf[:min(size, int64(len(d.buf)))])
		if err != nil {
			return err
		}
		if _, err := to.Write(d.buf[:n]); err != nil {
			return err
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
	canonical, err := settlePython(content.Exact, entries, d.pyc, d.restamp)
	if err != nil {
		return out, err
	}
	if out.Exact, err = draftTree(content.Exact, entries, canonical, t); err != nil {
		return out, err
	}
	python, found := d.asPython(entries, canonical)
	known := func(_ *content.Entry, p pyc, _ uint32) (content.ObjectID, error) {
		return p.canonical, nil // it is a pair, and has the same source
	}
	if _, err = settlePython(content.Python, python, found, known); err != nil {
		return out, err
	}
	out.Python, err = draftTree(content.Python, python, nil, t)
	return out, err
}

// asPython returns copies of the entries for another fidelity, and what is known of the compiled files.
func (d *drafter) asPython(entries []*content.Entry, canonical map[*content.Entry]content.Entry) (
	copies []*content.Entry, found map[*content.Entry]pyc,
) {
	copies = make([]*content.Entry, len(entries))
	found = map[*content.Entry]pyc{}
	for i, e := range entries {
		c := *e
		copies[i] = &c
		if p, ok := d.pyc[e]; ok {
			c.Data = slices.Clone(e.Data)
			p.canonical = canonical[e].Object
			found[&c] = p
		}
	}
	return copies, found
}

func draftTree(f content.Fidelity, entries []*content.Entry, canonical map[*content.Entry]content.Entry,
	t *tree.Tar) (DraftTree, error) {
	enc := tree.Encode(f, entries)
	facts := tree.Facts{Fidelity: f, Payload: tree.PayloadDigest(entries, canonical), Entries: int64(len(entries))}
	below := tree.BelowOf(entries)
	facts.Below = &below
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
