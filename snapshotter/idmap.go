package snapshotter

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// A container in a user namespace has its root file system's owners mapped. containerd names the mapping in two labels.
// Where it knows the capability "remap-ids" it maps by itself, told by the options of the mounts. Where not, it makes a
// snapshot whose files have been given other owners, and sends the labels all the same: such a parent is known by its
// name.

const (
	// labelIDMap marks an active snapshot or a view whose owners containerd maps: "uids gids".
	labelIDMap = labelPrefix + "id-map"
	// linkMounts is a symbolic link to the directory where chain images are mounted (lower.Kernel.Overlay says why).
	linkMounts = "mounts"
)

// idMap is how owners are mapped; the zero value is not at all.
type idMap struct{ uids, gids string }

func idMapOf(info snapshots.Info) (m idMap) {
	m.uids, m.gids, _ = strings.Cut(info.Labels[labelIDMap], " ")
	return m
}

func flavourOf(info snapshots.Info) lower.Flavour {
	return lower.Flavour(info.Labels[labelIDMap] != "")
}

// maps returns how the owners below a snapshot that is about to be created are to be mapped. In a transaction.
func (k idMapper) maps(ctx context.Context, key, parent string, labels map[string]string) (m idMap, err error) {
	m = idMap{labels[snapshots.LabelSnapshotUIDMapping], labels[snapshots.LabelSnapshotGIDMapping]}
	if m == (idMap{}) || isExtraction(key, labels) { // a layer's labels can come from an image's annotations
		return idMap{}, nil
	}
	uids, gids, err := m.parse()
	if err != nil {
		return m, err
	}
	if parent != "" {
		_, info, _, err := getInfo(ctx, parent)
		if err != nil {
			return m, err
		}
		if isRemapped(info.Name, info.Parent, uids, gids) {
			return idMap{}, nil
		}
	}
	if k.no != nil {
		return m, fmt.Errorf("this kernel cannot map the owners of files for user namespaces (%w): "+
			"take remap-ids out of the capabilities of containerd's proxy plugin "+
			"(`dedupctl config containerd --write`), and it copies the files instead: %w", k.no, errdefs.ErrFailedPrecondition)
	}
	return m, nil
}

// idMapper knows why the kernel cannot map owners; nil when it can.
type idMapper struct{ no error }

// idRange is a part of a mapping, with the names that containerd gives it in JSON.
type idRange struct {
	Inside  uint32 `json:"containerID"`
	Outside uint32 `json:"hostID"`
	Size    uint32 `json:"size"`
}

// parse reads both lists. Each has to say who is root.
func (m idMap) parse() (uids, gids []idRange, err error) {
	if uids, err = parseIDs(m.uids); err != nil {
		return nil, nil, fmt.Errorf("label %s: %w", snapshots.LabelSnapshotUIDMapping, err)
	}
	if gids, err = parseIDs(m.gids); err != nil {
		return nil, nil, fmt.Errorf("label %s: %w", snapshots.LabelSnapshotGIDMapping, err)
	}
	return uids, gids, nil
}

// parseIDs reads "inside:outside:size", separated by commas.
func parseIDs(text string) (list []idRange, err error) {
	for part := range strings.SplitSeq(text, ",") {
		var n [3]uint64
		fields := strings.Split(part, ":")
		for i := range n {
			if len(fields) != len(n) {
				err = errors.New("want three numbers")
			} else if err == nil {
				n[i], err = strconv.ParseUint(fields[i], 10, 32)
			}
		}
		if err == nil && (n[2] == 0 || max(n[0], n[1])+n[2] > math.MaxUint32) {
			err = errors.New("want ids below 4294967295, and at least one")
		}
		if err != nil {
			return nil, fmt.Errorf("%q is no mapping like 0:100000:65536: %w: %w", text, err, errdefs.ErrInvalidArgument)
		}
		list = append(list, idRange{uint32(n[0]), uint32(n[1]), uint32(n[2])})
	}
	if _, ok := toHost(list, 0); !ok {
		return nil, fmt.Errorf("%q maps no root: %w", text, errdefs.ErrInvalidArgument)
	}
	return list, nil
}

// toHost maps an id; false when it has no place outside.
func toHost(list []idRange, id uint32) (uint32, bool) {
	for _, m := range list {
		if id >= m.Inside && id-m.Inside < m.Size {
			return m.Outside + (id - m.Inside), true
		}
	}
	return 0, false
}

// owner returns who owns an upper directory over a root of uid and gid: one who has no place outside becomes root.
func (m idMap) owner(uid, gid uint32) (_, _ int, err error) {
	if m == (idMap{}) {
		return int(uid), int(gid), nil
	}
	uids, gids, err := m.parse()
	if err != nil {
		return 0, 0, err
	}
	pick := func(list []idRange, id uint32) int {
		at, ok := toHost(list, id)
		if !ok {
			at, _ = toHost(list, 0)
		}
		return int(at)
	}
	return pick(uids, uid), pick(gids, gid), nil
}

// isRemapped reports whether a committed snapshot is the one in which containerd gave every file of parent another
// owner: its name tells (containerd's client, remappedSnapshot; before 2.0 it is <parent>-<uid>-<gid>).
func isRemapped(name, parent string, uids, gids []idRange) bool {
	last := func(name string) string { return name[strings.LastIndexByte(name, '/')+1:] }
	sorted := func(list []idRange) []idRange {
		return slices.SortedStableFunc(slices.Values(list), func(a, b idRange) int {
			return int(int64(a.Inside) - int64(b.Inside))
		})
	}
	type both struct{ UidMap, GidMap []idRange }
	text, err := json.Marshal(struct {
		Parent string
		IDMap  both
	}{last(parent), both{sorted(uids), sorted(gids)}})
	if err != nil || parent == "" {
		return false
	}
	sum := sha256.Sum256(text)
	return last(name) == "sha256:"+hex.EncodeToString(sum[:]) ||
		last(name) == fmt.Sprintf("%s-%d-%d", last(parent), uids[0].Outside, gids[0].Outside)
}

// use notes which chain images a stored container or view lies on.
func use(c *lower.Chains, n *snapshotNode) {
	if p := n.base(); p != nil && p.whole {
		c.Users.Use(p.below(n.flavour), n.id)
	}
	if p := n.parent; len(n.over) > 0 && p != nil && p.whole {
		c.Users.Use(p.below(n.flavour), n.id+besideSteps)
	}
}

// linkTo makes a symbolic link, in place of one that leads elsewhere.
func linkTo(target, link string) error {
	target, err := filepath.Abs(target)
	if err != nil {
		return err
	}
	if have, err := os.Readlink(link); err == nil && have == target {
		return nil
	}
	tmp := link + ".new"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.Symlink(target, tmp); err != nil {
		return err
	}
	return os.Rename(tmp, link)
}
