package inventory

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"go.etcd.io/bbolt"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/forecast"
)

// Below a containerd's root:
//
//	io.containerd.metadata.v1.bolt/meta.db                     images, by namespace
//	io.containerd.content.v1.content/blobs/sha256/<hex>        manifests and configs
//	io.containerd.snapshotter.v1.overlayfs/metadata.db         snapshots: <namespace>/<n>/<chainID> -> id
//	io.containerd.snapshotter.v1.overlayfs/snapshots/<id>/fs   their files
const (
	overlayfsRoot = "io.containerd.snapshotter.v1.overlayfs"
	metadataDB    = "io.containerd.metadata.v1.bolt/meta.db"
	blobsDir      = "io.containerd.content.v1.content/blobs"
)

// snapshot is one of overlayfs's.
type snapshot struct {
	id, name, parent string
	kind             snapshots.Kind
}

// namespace and chain are parts of the name that containerd gives a committed snapshot.
func (s snapshot) namespace() string {
	ns, _, _ := strings.Cut(s.name, "/")
	return ns
}

func (s snapshot) chain() string { return s.name[strings.LastIndexByte(s.name, '/')+1:] }

// overlayfs collects the inventory of one root.
type overlayfs struct {
	root   string
	byName map[string]snapshot
	inv    *Inventory
	at     map[string]int // by name
}

// readOverlayfs reads the root of containerd's overlayfs snapshotter.
func readOverlayfs(ctx context.Context, root string, opts Options) (*Inventory, error) {
	tmp, err := os.MkdirTemp("", "dedupctl-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	o := &overlayfs{root: root, inv: &Inventory{Kind: "containerd's overlayfs"}, byName: map[string]snapshot{},
		at: map[string]int{}}
	if err := o.readSnapshots(ctx, tmp); err != nil {
		return nil, fmt.Errorf("snapshots of %s: %w", root, err)
	}
	images, err := readImages(ctx, tmp, filepath.Dir(root), opts)
	if err != nil {
		return nil, fmt.Errorf("images of %s: %w", filepath.Dir(root), err)
	}
	if err := o.addLayers(ctx, images); err != nil {
		return nil, err
	}
	o.addImages(images)
	o.inv.Blobs = map[digest.Digest]int64{}
	for _, img := range images {
		maps.Copy(o.inv.Blobs, img.blobs)
	}
	return o.inv, o.addContainers(ctx)
}

// readSnapshots reads a copy of metadata.db.
func (o *overlayfs) readSnapshots(ctx context.Context, tmp string) error {
	db := filepath.Join(tmp, "metadata.db")
	if err := copyDB(ctx, filepath.Join(o.root, "metadata.db"), db); err != nil {
		return err
	}
	ms, err := storage.NewMetaStore(db)
	if err != nil {
		return err
	}
	err = guard(ms.Close, func() error {
		return ms.WithTransaction(ctx, false, func(ctx context.Context) error {
			ids, err := storage.IDMap(ctx)
			if errdefs.IsNotFound(err) {
				return nil // no snapshot was ever made
			}
			if err != nil {
				return err
			}
			for id, name := range ids {
				_, info, _, err := storage.GetInfo(ctx, name)
				if err != nil {
					return err
				}
				o.byName[name] = snapshot{id, name, info.Parent, info.Kind}
			}
			return nil
		})
	})
	if err != nil {
		return fmt.Errorf("a copy of metadata.db: %w", err)
	}
	return nil
}

// guard makes an error of what bbolt does with a damaged database: it panics, or follows a page number out of the file.
// Its locks stay taken then, so the database is closed only where that did not happen.
func guard(closeDB, fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the database is damaged: %v", p)
		}
	}()
	return errors.Join(fn(), closeDB())
}

// copyDB copies a bolt database that another process may be writing to. Its first two pages say which of the others
// count, so a copy is whole when they have not changed meanwhile.
func copyDB(ctx context.Context, from, to string) error {
	const heads, tries = 8192, 20
	head := func() ([]byte, error) {
		f, err := os.Open(from)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		b := make([]byte, heads)
		n, err := io.ReadFull(f, b)
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = nil
		}
		return b[:n], err
	}
	for range tries {
		before, err := head()
		if err != nil {
			return err
		}
		data, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		after, err := head()
		if err != nil {
			return err
		}
		if bytes.Equal(before, after) && bytes.HasPrefix(data, after) {
			return os.WriteFile(to, data, 0o600)
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return fmt.Errorf("%s changes all the time: try again when containerd pulls nothing", from)
}

// named is an image of containerd's, in one namespace.
type named struct {
	namespace, name string
	chains          []string // chainIDs, base first
	diffIDs         []content.DiffID
	blobs           map[digest.Digest]int64 // of its layers, those that are there
}

// readImages reads containerd's images from a copy of its database, and their configs from its content store. Where
// there is none (the snapshotter's root was moved, or copied alone) there are no names and no diffIDs, and that is all.
func readImages(ctx context.Context, tmp, root string, opts Options) (list []named, err error) {
	path := filepath.Join(tmp, "meta.db")
	if err := copyDB(ctx, filepath.Join(root, metadataDB), path); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
		return nil, err
	}
	var db *bbolt.DB
	closeDB := func() error {
		if db == nil {
			return nil
		}
		return db.Close()
	}
	err = guard(closeDB, func() (err error) {
		if db, err = bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true}); err == nil {
			list, err = imagesIn(ctx, db, dirBlobs(filepath.Join(root, blobsDir)), opts)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("a copy of %s: %w", filepath.Join(root, metadataDB), err)
	}
	return list, nil
}

func imagesIn(ctx context.Context, db *bbolt.DB, blobs blobStore, opts Options) (list []named, err error) {
	var spaces []string
	err = db.View(func(tx *bbolt.Tx) error {
		spaces, err = metadata.NewNamespaceStore(tx).List(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}
	store := metadata.NewImageStore(metadata.NewDB(db, nil, nil))
	for _, ns := range spaces {
		all, err := store.List(namespaces.WithNamespace(ctx, ns))
		if err != nil {
			return nil, err
		}
		for _, img := range all {
			manifest, diffIDs, err := manifestOf(ctx, blobs, img.Target, opts.Platform)
			if err != nil {
				continue // of another platform, or not an image of layers: then nothing of it is unpacked
			}
			n := named{namespace: ns, name: img.Name, blobs: map[digest.Digest]int64{}}
			for _, l := range manifest.Layers {
				if ra, err := blobs.ReaderAt(ctx, l); err == nil { // else it was dropped
					n.blobs[l.Digest] = ra.Size()
					ra.Close()
				}
			}
			var chain content.ChainID
			for _, text := range diffIDs {
				sum, err := content.ParseSum(text.String())
				if err != nil {
					return nil, fmt.Errorf("image %s: %w", img.Name, err)
				}
				diffID := content.DiffID{Sum: sum}
				chain = chain.Chain(diffID)
				n.diffIDs, n.chains = append(n.diffIDs, diffID), append(n.chains, chain.Digest().String())
			}
			list = append(list, n)
		}
	}
	return list, nil
}

// addLayers adds every committed snapshot.
func (o *overlayfs) addLayers(ctx context.Context, images []named) error {
	diffIDs := map[string]content.DiffID{} // by chainID
	for _, img := range images {
		for i, chain := range img.chains {
			diffIDs[chain] = img.diffIDs[i]
		}
	}
	var names []string
	for name, s := range o.byName {
		if s.kind == snapshots.KindCommitted {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		s := o.byName[name]
		diffID := diffIDs[s.chain()]
		if sum, err := content.ParseSum(s.chain()); err == nil && s.parent == "" {
			diffID = content.DiffID{Sum: sum} // a base layer's chainID
		}
		dir := filepath.Join(o.root, "snapshots", s.id)
		l, err := directory(ctx, name, filepath.Join(dir, "fs"), dir, diffID)
		if errors.Is(err, os.ErrNotExist) {
			continue // removed since the database was copied
		}
		if err != nil {
			return err
		}
		o.at[name] = len(o.inv.Layers)
		o.inv.Layers = append(o.inv.Layers, l)
	}
	return nil
}

// stack returns the layers of a committed snapshot, base first; nil when one is gone.
func (o *overlayfs) stack(name string) (layers []int) {
	for name != "" {
		i, ok := o.at[name]
		if !ok || len(layers) > len(o.at) { // gone, or a circle in a damaged database
			return nil
		}
		layers = append(layers, i)
		name = o.byName[name].parent
	}
	slices.Reverse(layers)
	return layers
}

// addImages adds the images, and the stacks that belong to none.
func (o *overlayfs) addImages(images []named) {
	tops := map[string]string{} // namespace and chainID -> snapshot
	below := map[string]bool{}  // parents of committed ones
	for name, s := range o.byName {
		if s.kind == snapshots.KindCommitted {
			tops[s.namespace()+" "+s.chain()] = name
			below[s.parent] = true
		}
	}
	names := map[string][]string{}
	for _, img := range images {
		if len(img.chains) == 0 {
			continue
		}
		if top, ok := tops[img.namespace+" "+img.chains[len(img.chains)-1]]; ok {
			names[top] = append(names[top], img.name)
		}
	}
	var all []string
	for name := range o.at {
		if len(names[name]) > 0 || !below[name] {
			all = append(all, name)
		}
	}
	slices.Sort(all)
	for _, name := range all {
		if layers := o.stack(name); layers != nil {
			o.inv.Images = append(o.inv.Images, Image{names[name], layers})
		}
	}
}

// addContainers notes which layers lie below active snapshots, and what those hold.
func (o *overlayfs) addContainers(ctx context.Context) error {
	for name, s := range o.byName {
		if s.kind == snapshots.KindCommitted {
			continue
		}
		dir := filepath.Join(o.root, "snapshots", s.id)
		l, err := directory(ctx, name, filepath.Join(dir, "fs"), dir, content.DiffID{})
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		o.inv.Containers++
		o.inv.Writable = forecast.Add(o.inv.Writable, l.Now)
		for _, i := range o.stack(s.parent) {
			o.inv.Layers[i].InUse = true
		}
	}
	return nil
}
