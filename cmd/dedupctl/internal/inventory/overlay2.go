package inventory

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/forecast"
)

// Below Docker's root:
//
//	overlay2/<id>/diff                                  a layer's files, or what a container has written
//	overlay2/<id>/lower                                 l/<link>:l/<link>..., the parent first
//	overlay2/<id>/link                                  its own <link>
//	overlay2/<id>-init/                                 below a container's <id>
//	image/overlay2/imagedb/content/sha256/<image>       configs
//	image/overlay2/layerdb/sha256/<chainID>/cache-id    <id>
//	image/overlay2/repositories.json                    names
const (
	initSuffix = "-init"
	// maxSmall bounds the small files, and maxConfig an image's config, in bytes.
	maxSmall  = 1 << 20
	maxConfig = 16 << 20
)

// overlay2 collects the inventory of one directory.
type overlay2 struct {
	root    string
	parents map[string]string         // id -> id below it, "" for a base layer
	diffIDs map[string]content.DiffID // by id
	images  map[string][]string       // id of the last layer -> names
	inv     *Inventory
	at      map[string]int // by id
}

// readOverlay2 reads a Docker's overlay2 directory, and what lies beside it of Docker's databases.
func readOverlay2(ctx context.Context, root string) (*Inventory, error) {
	o := &overlay2{
		root: root, parents: map[string]string{}, diffIDs: map[string]content.DiffID{}, images: map[string][]string{},
		inv: &Inventory{Kind: "Docker's overlay2"}, at: map[string]int{},
	}
	if err := o.readParents(); err != nil {
		return nil, fmt.Errorf("layers of %s: %w", root, err)
	}
	if err := o.readImages(filepath.Join(filepath.Dir(root), "image/overlay2")); err != nil {
		return nil, fmt.Errorf("images of %s: %w", filepath.Dir(root), err)
	}
	return o.inv, o.collect(ctx)
}

// small reads a file of one line; "" for one that is not there.
func small(path string) (string, error) {
	fi, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	if fi.Size() > maxSmall {
		return "", fmt.Errorf("%s has %d bytes", path, fi.Size())
	}
	b, err := os.ReadFile(path)
	return strings.TrimSpace(string(b)), err
}

func (o *overlay2) readParents() error {
	dirs, err := os.ReadDir(o.root)
	if err != nil {
		return err
	}
	byLink := map[string]string{}
	lowers := map[string]string{}
	for _, d := range dirs {
		id := d.Name()
		if !d.IsDir() || id == "l" {
			continue
		}
		if _, err := os.Stat(filepath.Join(o.root, id, "diff")); err != nil {
			continue // being made or removed
		}
		link, err := small(filepath.Join(o.root, id, "link"))
		if err != nil {
			return err
		}
		lower, err := small(filepath.Join(o.root, id, "lower"))
		if err != nil {
			return err
		}
		byLink[link] = id
		lowers[id], _, _ = strings.Cut(lower, ":")
	}
	for id, lower := range lowers {
		o.parents[id] = ""
		if lower != "" {
			parent, ok := byLink[strings.TrimPrefix(lower, "l/")]
			if !ok {
				return fmt.Errorf("%s names %s as its parent, which is not there", filepath.Join(o.root, id, "lower"), lower)
			}
			o.parents[id] = parent
		}
	}
	return nil
}

// readImages reads names and diffIDs; without Docker's databases there are none.
func (o *overlay2) readImages(dir string) error {
	configs, err := os.ReadDir(filepath.Join(dir, "imagedb/content/sha256"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	names, err := repositories(filepath.Join(dir, "repositories.json"))
	if err != nil {
		return err
	}
	for _, c := range configs {
		var config struct {
			RootFS struct {
				DiffIDs []digest.Digest `json:"diff_ids"`
			} `json:"rootfs"`
		}
		if err := readJSON(filepath.Join(dir, "imagedb/content/sha256", c.Name()), &config); err != nil {
			return err
		}
		var id string
		var chain content.ChainID
		for _, text := range config.RootFS.DiffIDs {
			sum, err := content.ParseSum(text.String())
			if err != nil {
				return fmt.Errorf("image %s: %w", c.Name(), err)
			}
			diffID := content.DiffID{Sum: sum}
			chain = chain.Chain(diffID)
			if id, err = small(filepath.Join(dir, "layerdb/sha256", chain.Hex(), "cache-id")); err != nil {
				return err
			}
			o.diffIDs[id] = diffID
		}
		if _, ok := o.parents[id]; !ok {
			continue // without layers, or unpacked elsewhere
		}
		all := names["sha256:"+c.Name()]
		if len(all) == 0 {
			all = []string{"sha256:" + c.Name()}
		}
		o.images[id] = append(o.images[id], all...)
	}
	return nil
}

// repositories returns the names of images, by their ids.
func repositories(path string) (map[string][]string, error) {
	var file struct{ Repositories map[string]map[string]string }
	if err := readJSON(path, &file); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	names := map[string][]string{}
	for _, tags := range file.Repositories {
		for name, id := range tags {
			if !strings.Contains(name, "@") {
				names[id] = append(names[id], name)
			}
		}
	}
	for _, list := range names {
		slices.Sort(list)
	}
	return names, nil
}

func readJSON(path string, into any) error {
	fi, err := os.Stat(path)
	if err != nil {
		return err
	}
	if fi.Size() > maxConfig {
		return fmt.Errorf("%s has %d bytes", path, fi.Size())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// collect adds layers, images and containers.
func (o *overlay2) collect(ctx context.Context) error {
	below, writable := map[string]bool{}, map[string]bool{}
	for id := range o.parents {
		if base, ok := strings.CutSuffix(id, initSuffix); ok {
			writable[id], writable[base] = true, true
		}
	}
	var ids []string
	for id, parent := range o.parents {
		ids = append(ids, id)
		if !writable[id] {
			below[parent] = true
		}
	}
	slices.Sort(ids)
	for _, id := range ids {
		dir := filepath.Join(o.root, id)
		l, err := directory(ctx, id, filepath.Join(dir, "diff"), dir, o.diffIDs[id])
		if err != nil {
			return err
		}
		if writable[id] {
			o.inv.Writable = forecast.Add(o.inv.Writable, l.Now)
			continue
		}
		o.at[id] = len(o.inv.Layers)
		o.inv.Layers = append(o.inv.Layers, l)
	}
	for _, id := range ids {
		if writable[id] {
			if strings.HasSuffix(id, initSuffix) {
				o.inv.Containers++
				for _, i := range o.stack(o.parents[id]) {
					o.inv.Layers[i].InUse = true
				}
			}
			continue
		}
		if len(o.images[id]) > 0 || !below[id] {
			slices.Sort(o.images[id])
			o.inv.Images = append(o.inv.Images, Image{o.images[id], o.stack(id)})
		}
	}
	return nil
}

// stack returns the layers of an id, base first.
func (o *overlay2) stack(id string) (layers []int) {
	for id != "" && len(layers) <= len(o.parents) { // a circle ends too
		if i, ok := o.at[id]; ok {
			layers = append(layers, i)
		}
		id = o.parents[id]
	}
	slices.Reverse(layers)
	return layers
}
