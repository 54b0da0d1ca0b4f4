package main

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	dedup "github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// What becomes of an image.
const (
	stateMigrate    = "to migrate" // only in a dry run
	stateMigrated   = "migrated"
	statePresent    = "present" // it was there before
	stateIncomplete = "incomplete"
	stateFailed     = "failed"
)

// Migration is what `migrate --json` prints.
type Migration struct {
	From   string           `json:"from"`
	To     string           `json:"to"`
	DryRun bool             `json:"dry_run"`
	Images []MigrationImage `json:"images"`
	// Removed are the snapshots of From that went (in a dry run: that would go), with what From says they occupy.
	Removed      int64 `json:"removed_snapshots"`
	RemovedBytes int64 `json:"removed_bytes"`
	// Kept are those of the migrated images that containers or other images still use.
	Kept       int64    `json:"kept_snapshots"`
	Containers []string `json:"containers"` // namespace/id of those, or of a snapshot that belongs to none
}

// MigrationImage is one manifest that From has unpacked.
type MigrationImage struct {
	Namespace string   `json:"namespace"`
	Names     []string `json:"names"`
	Manifest  string   `json:"manifest"`
	State     string   `json:"state"`
	Layers    int64    `json:"layers"`
	BlobBytes int64    `json:"blob_bytes"` // compressed
	Missing   []string `json:"missing"`    // digests of blobs that the content store does not have
	Error     string   `json:"error,omitempty"`
}

// stack is one image of a migration.
type stack struct {
	MigrationImage
	manifest ocispec.Descriptor
	config   digest.Digest
	chains   []string // snapshots' names, base first
	sizes    []int64  // of the layers' blobs
	missing  []string // those of chains whose own blob is missing, and that To does not have
}

func (s *stack) top() string { return s.chains[len(s.chains)-1] }

// migration moves images from one snapshotter to another within one containerd.
type migration struct {
	ctd       *client.Client
	from, to  string
	only      []string // images' names; nil is all
	removeOld bool

	stacks []*stack
	total  int64        // bytes of blobs that are to be unpacked
	done   atomic.Int64 // so far
	out    Migration
}

// gcLabel, on an image's config, is what keeps its snapshots: containerd's garbage collector follows it.
func gcLabel(snapshotter string) string { return "containerd.io/gc.ref.snapshot." + snapshotter }

// plan finds the images of a namespace that From has unpacked.
func (m *migration) plan(ctx context.Context, namespace string) error {
	ctx = namespaces.WithNamespace(ctx, namespace)
	list, err := m.ctd.ImageService().List(ctx)
	if err != nil {
		return fmt.Errorf("list images of namespace %s: %w", namespace, err)
	}
	seen := map[digest.Digest]*stack{}
	for _, img := range list {
		if len(m.only) > 0 && !slices.Contains(m.only, img.Name) {
			continue
		}
		manifests, err := m.manifests(ctx, img.Target)
		if err != nil {
			return fmt.Errorf("image %s: %w", img.Name, err)
		}
		for _, desc := range manifests {
			if s := seen[desc.Digest]; s != nil {
				s.Names = append(s.Names, img.Name)
				continue
			}
			s, err := m.look(ctx, desc)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err != nil {
				s = &stack{manifest: desc, MigrationImage: MigrationImage{Manifest: desc.Digest.String(), State: stateFailed,
					Missing: []string{}, Error: err.Error()}}
			}
			if s == nil {
				continue
			}
			s.Namespace, s.Names = namespace, []string{img.Name}
			seen[desc.Digest] = s
			m.stacks = append(m.stacks, s)
		}
	}
	return nil
}

// order puts the images that only lack blobs of layers which other images bring behind those. It comes after all plans.
func (m *migration) order() {
	brought := map[string]bool{}
	var ready, rest []*stack
	take := func(s *stack) {
		ready = append(ready, s)
		for _, chain := range s.chains {
			brought[s.Namespace+" "+chain] = true
		}
	}
	for _, s := range m.stacks {
		if s.State == stateMigrate || s.State == statePresent {
			take(s)
		} else {
			rest = append(rest, s)
		}
	}
	for again := true; again; {
		again = false
		rest = slices.DeleteFunc(rest, func(s *stack) bool {
			lacks := func(chain string) bool { return !brought[s.Namespace+" "+chain] }
			if s.State != stateIncomplete || slices.ContainsFunc(s.missing, lacks) {
				return false
			}
			s.State, again = stateMigrate, true
			take(s)
			return true
		})
	}
	m.stacks = append(ready, rest...)
	for _, s := range m.stacks {
		if s.State == stateMigrate {
			m.total += s.BlobBytes
		}
	}
}

// manifests returns the manifests at and below a descriptor that the content store has.
func (m *migration) manifests(ctx context.Context, target ocispec.Descriptor) (found []ocispec.Descriptor, err error) {
	store := m.ctd.ContentStore()
	err = images.Walk(ctx, images.HandlerFunc(func(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor,
		error) {
		switch {
		case images.IsManifestType(desc.MediaType):
			found = append(found, desc)
			return nil, nil
		case images.IsIndexType(desc.MediaType):
			children, err := images.Children(ctx, store, desc)
			if errdefs.IsNotFound(err) {
				return nil, nil
			}
			return children, err
		}
		return nil, nil
	}), target)
	return found, err
}

// look looks at one manifest; nil when From has not unpacked it.
func (m *migration) look(ctx context.Context, desc ocispec.Descriptor) (*stack, error) {
	store := m.ctd.ContentStore()
	manifest, err := images.Manifest(ctx, store, desc, platforms.All)
	if errdefs.IsNotFound(err) {
		return nil, nil // of another platform
	}
	if err != nil {
		return nil, err
	}
	if !images.IsConfigType(manifest.Config.MediaType) {
		return nil, nil // another kind of artifact
	}
	diffIDs, err := images.RootFS(ctx, store, manifest.Config)
	if errdefs.IsNotFound(err) || len(diffIDs) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	s := &stack{manifest: desc, config: manifest.Config.Digest}
	s.Manifest, s.Layers, s.State, s.Missing = desc.Digest.String(), int64(len(diffIDs)), stateMigrate, []string{}
	var chain dedup.ChainID
	for _, text := range diffIDs {
		sum, err := dedup.ParseSum(text.String())
		if err != nil {
			return nil, fmt.Errorf("diffID of config %s: %w", s.config, err)
		}
		chain = chain.Chain(dedup.DiffID{Sum: sum})
		s.chains = append(s.chains, chain.Digest().String())
	}
	if have, err := exists(ctx, m.ctd.SnapshotService(m.from), s.top()); !have || err != nil {
		return nil, err
	}
	if err := m.lookAtBlobs(ctx, s, manifest); err != nil {
		return nil, err
	}
	info, err := store.Info(ctx, s.config)
	if err != nil {
		return nil, err
	}
	have, err := exists(ctx, m.ctd.SnapshotService(m.to), s.top())
	switch {
	case err != nil:
		return nil, err
	case have && info.Labels[gcLabel(m.to)] == s.top():
		s.State = statePresent
	case len(s.missing) > 0:
		s.State = stateIncomplete
	}
	return s, nil
}

// lookAtBlobs notes the blobs that the content store lacks.
func (m *migration) lookAtBlobs(ctx context.Context, s *stack, manifest ocispec.Manifest) error {
	i := -1
	for _, l := range manifest.Layers {
		if !images.IsLayerType(l.MediaType) {
			continue
		}
		if i++; i == len(s.chains) {
			break
		}
		s.BlobBytes += l.Size
		s.sizes = append(s.sizes, l.Size)
		_, err := m.ctd.ContentStore().Info(ctx, l.Digest)
		if err == nil {
			continue
		}
		if !errdefs.IsNotFound(err) {
			return err
		}
		s.Missing = append(s.Missing, l.Digest.String())
		have, err := exists(ctx, m.ctd.SnapshotService(m.to), s.chains[i])
		if err != nil {
			return err
		}
		if !have {
			s.missing = append(s.missing, s.chains[i])
		}
	}
	if i+1 != len(s.chains) {
		return fmt.Errorf("manifest %s has not as many layers as its config has diffIDs", s.Manifest)
	}
	return nil
}

func exists(ctx context.Context, sn snapshots.Snapshotter, name string) (bool, error) {
	info, err := sn.Stat(ctx, name)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil && info.Kind == snapshots.KindCommitted, err
}

// execute unpacks what is to be unpacked, one image after the other, and goes on when one fails. An error is returned
// when ctx ends, or nobody answers.
func (m *migration) execute(ctx context.Context) error {
	for _, s := range m.stacks {
		if s.State != stateMigrate {
			continue
		}
		nsCtx := namespaces.WithNamespace(ctx, s.Namespace)
		if err := m.unpack(nsCtx, s); err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if errdefs.IsUnavailable(err) {
				return fmt.Errorf("containerd, or its snapshotter %s, does not answer (systemctl start containerd-dedup-grpc; "+
					"what is migrated stays so): %w", m.to, err)
			}
			s.State, s.Error = stateFailed, err.Error()
		} else {
			s.State = stateMigrated
		}
	}
	return nil
}

// follow counts the layers of an image while they are unpacked one after the other.
func (m *migration) follow(ctx context.Context, s *stack) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	before := m.done.Load()
	var wg sync.WaitGroup
	wg.Go(func() {
		for i, chain := range s.chains {
			for {
				if have, _ := exists(ctx, m.ctd.SnapshotService(m.to), chain); have {
					break
				}
				select {
				case <-time.After(progressEvery):
				case <-ctx.Done():
					return
				}
			}
			m.done.Add(s.sizes[i])
		}
	})
	return func() {
		cancel()
		wg.Wait()
		m.done.Store(before + s.BlobBytes)
	}
}

// unpack unpacks one image with To from the content store.
func (m *migration) unpack(ctx context.Context, s *stack) error {
	img := client.NewImageWithPlatform(m.ctd, images.Image{Name: s.Names[0], Target: s.manifest}, platforms.All)
	defer m.follow(ctx, s)()
	if err := img.Unpack(ctx, m.to); err != nil {
		return fmt.Errorf("unpack with %s: %w", m.to, err)
	}
	return nil
}

// result returns what is to be printed.
func (m *migration) result() Migration {
	v := m.out
	v.From, v.To = m.from, m.to
	v.Images = []MigrationImage{}
	for _, s := range m.stacks {
		v.Images = append(v.Images, s.MigrationImage)
	}
	if v.Containers == nil {
		v.Containers = []string{}
	}
	return v
}
