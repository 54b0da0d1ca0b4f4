package snapshotter

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

const (
	labelPrefix = "dedup-snapshotter.io/"
	// labelLayer is the layer of a committed snapshot, or of an active one after Applied.
	labelLayer = labelPrefix + "layer"
	// labelStaged marks an active snapshot that stands for a layer since Prepare: there is nothing to apply.
	labelStaged = labelPrefix + "staged"
	// labelPending marks a committed snapshot whose directory is not yet ingested; pendingStep is one of its values.
	labelPending = labelPrefix + "pending"
	// labelOver names the directories of steps that an active snapshot or a view lies over: ids, the topmost first.
	labelOver = labelPrefix + "over"
	// labelNamespace is the containerd namespace of the client who committed the snapshot.
	labelNamespace = labelPrefix + "namespace"
	// labelUpdated is when a client last changed the snapshot; we change it after that.
	labelUpdated = labelPrefix + "updated"
	// labelClaim is what a snapshot, the first of its layer, claims of the disk: bytes and inodes.
	labelClaim = labelPrefix + "claim"
	// labelCompared is the layer of the tar that a comparison of the snapshot with another one gave.
	labelCompared = labelPrefix + "compared"
	// labelSeal is a checksum of all else that is stored of the snapshot.
	labelSeal = labelPrefix + "seal"

	// Labels that containerd sends (2.3 and newer: the last two).
	labelRef         = "containerd.io/snapshot.ref"
	labelDiffID      = "containerd.io/snapshot/diff-id"
	labelParentChain = "containerd.io/snapshot/parent-chain-id"
	// labelUIDMapping says that the snapshot is for a container in a user namespace.
	labelUIDMapping = "containerd.io/snapshot/uidmapping"
	// labelCRIDigest is the layer's blob, from the clients that annotate it (CRI, nerdctl, moby).
	labelCRIDigest = "containerd.io/snapshot/cri.layer-digest"
)

// public returns a client's labels without those that only we may set.
func public(labels map[string]string) map[string]string {
	out := map[string]string{}
	for k, v := range labels {
		if !strings.HasPrefix(k, labelPrefix) {
			out[k] = v
		}
	}
	return out
}

// withPrivate returns a client's labels and the private ones of the stored snapshot.
func withPrivate(client, stored map[string]string) map[string]string {
	out := public(client)
	for k, v := range stored {
		if strings.HasPrefix(k, labelPrefix) {
			out[k] = v
		}
	}
	return out
}

// clientLabels collects the labels of opts that a client may set.
func clientLabels(opts []snapshots.Opt) (snapshots.Info, error) {
	var base snapshots.Info
	for _, opt := range opts {
		if err := opt(&base); err != nil {
			return base, err
		}
	}
	base.Labels = public(base.Labels)
	return base, nil
}

// claim returns the private labels of a snapshot that stands for a held layer from now on.
func (s *store) claim(id content.LayerID) map[string]string {
	private := map[string]string{labelLayer: id.Hex(), labelClaim: ""}
	if u, ok := s.layers.Claim(id, s.chains.Images.Usage()); ok {
		private[labelClaim] = fmt.Sprintf(claimFormat, u.Bytes, u.Inodes)
	}
	return private
}

// release gives up the layer that a snapshot with these labels stands for, if any.
func (s *store) release(labels map[string]string) {
	id, ok := layerOf(snapshots.Info{Labels: labels})
	if !ok {
		return
	}
	if labels[labelClaim] != "" {
		s.layers.Unclaim(id)
	}
	s.layers.Release(id)
}

const claimFormat = "%d %d"

// reclaim restores the claim of a stored snapshot, if it has one.
func (s *store) reclaim(info snapshots.Info) {
	var u layer.Usage
	id, ok := layerOf(info)
	if _, err := fmt.Sscanf(info.Labels[labelClaim], claimFormat, &u.Bytes, &u.Inodes); ok && err == nil {
		s.layers.Reclaim(id, u)
	}
}

func layerOf(info snapshots.Info) (content.LayerID, bool) {
	sum, err := content.ParseSum(info.Labels[labelLayer])
	return content.LayerID{Sum: sum}, err == nil
}

// setPrivate replaces private labels of the stored snapshot that has both key and id; an empty value
// clears one. In a writable transaction.
func setPrivate(ctx context.Context, key, id string, private map[string]string) error {
	have, info, _, err := getInfo(ctx, key)
	if err != nil {
		return err
	}
	if have != id {
		return fmt.Errorf("snapshot %q was replaced: %w", key, errdefs.ErrNotFound)
	}
	old := info
	info.Labels = maps.Clone(info.Labels)
	for k, v := range private {
		if info.Labels[k] = v; v == "" {
			delete(info.Labels, k)
		}
	}
	_, err = updateInfo(ctx, old, info, "labels")
	return err
}

// visible is what a client sees of a stored snapshot: nothing of what we note there, so that an
// ingest in the background does not look like an update.
func visible(info snapshots.Info) snapshots.Info {
	if t, err := time.Parse(time.RFC3339Nano, info.Labels[labelUpdated]); err == nil {
		info.Updated = t
	}
	if len(info.Labels) > 0 {
		info.Labels = public(info.Labels)
	}
	return info
}

// checkUpdate refuses fieldpaths that name a private label.
func checkUpdate(fieldpaths []string) error {
	for _, p := range fieldpaths {
		if strings.HasPrefix(p, "labels."+labelPrefix) {
			return fmt.Errorf("label %s is set by the snapshotter alone: %w", strings.TrimPrefix(p, "labels."),
				errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// isExtraction reports whether an active snapshot is there to be filled with one layer. Clients
// that unpack by themselves (client.Image.Unpack) send no label, but name it so too.
func isExtraction(key string, labels map[string]string) bool {
	if _, ok := labels[labelRef]; ok {
		return true
	}
	return strings.HasPrefix(key[strings.LastIndexByte(key, '/')+1:], "extract-")
}

// chainOfName returns the chainID that a committed snapshot is named by: containerd's
// names for proxies are <namespace>/<sequence>/<chainID>.
func chainOfName(name string) (content.ChainID, bool) {
	last := name[strings.LastIndexByte(name, '/')+1:]
	if !strings.HasPrefix(last, "sha256:") {
		return content.ChainID{}, false
	}
	sum, err := content.ParseSum(last)
	return content.ChainID{Sum: sum}, err == nil
}
