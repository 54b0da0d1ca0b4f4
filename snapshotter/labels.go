package snapshotter

import (
	"maps"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// Private labels. They are part of the format of metadata.db.
const (
	privatePrefix = "dedup-snapshotter.io/"
	// labelLayer names the layer of a snapshot, which holds it once.
	labelLayer = privatePrefix + "layer"
	// labelPending marks a committed snapshot whose directory awaits its ingest.
	labelPending = privatePrefix + "pending"
	// labelExtract marks an active snapshot that a layer is to be unpacked into.
	labelExtract = privatePrefix + "extract"
	// labelStaged marks an active snapshot that was served from the store.
	labelStaged = privatePrefix + "staged"
	// labelNamespace is the containerd namespace that the snapshot was made for.
	labelNamespace = privatePrefix + "namespace"
	// labelUpdated hides that we changed a private label: it is the Updated time that
	// clients go on to see.
	labelUpdated = privatePrefix + "updated"
)

// Labels of containerd. The second is not exported there.
const (
	labelDiffID      = snapshots.LabelSnapshotDiffID
	labelParentChain = "containerd.io/snapshot/parent-chain-id"
)

const labelTrue = "true"

func isPrivate(label string) bool { return strings.HasPrefix(label, privatePrefix) }

// publicLabels returns the labels that are not ours.
func publicLabels(labels map[string]string) map[string]string {
	if labels == nil {
		return nil
	}
	out := make(map[string]string, len(labels))
	for k, v := range labels {
		if !isPrivate(k) {
			out[k] = v
		}
	}
	return out
}

// withPrivate returns the public labels of a client with ours added.
func withPrivate(public, private map[string]string) map[string]string {
	out := publicLabels(public)
	if out == nil {
		out = map[string]string{}
	}
	for k, v := range private {
		if isPrivate(k) && v != "" {
			out[k] = v
		}
	}
	return out
}

// publicInfo is what a client sees of a stored snapshot.
func publicInfo(info snapshots.Info) snapshots.Info {
	if t, err := time.Parse(time.RFC3339Nano, info.Labels[labelUpdated]); err == nil {
		info.Updated = t
	}
	info.Labels = publicLabels(info.Labels)
	return info
}

// layerOf returns the layer that a stored snapshot names.
func layerOf(info snapshots.Info) (content.LayerID, bool) {
	sum, err := content.ParseSum(info.Labels[labelLayer])
	return content.LayerID{Sum: sum}, err == nil
}

func isPending(info snapshots.Info) bool { return info.Labels[labelPending] != "" }

func isExtract(info snapshots.Info) bool {
	return info.Kind == snapshots.KindActive && info.Labels[labelExtract] != ""
}

// applyOpts returns the Info that a client's options describe.
func applyOpts(opts []snapshots.Opt) (snapshots.Info, error) {
	var base snapshots.Info
	for _, opt := range opts {
		if err := opt(&base); err != nil {
			return snapshots.Info{}, err
		}
	}
	base.Labels = publicLabels(base.Labels)
	return base, nil
}

// relabel returns info's labels with the given private ones changed ("" removes) and
// the time of the last visible change kept.
func relabel(info snapshots.Info, private map[string]string) map[string]string {
	out := maps.Clone(info.Labels)
	if out == nil {
		out = map[string]string{}
	}
	if out[labelUpdated] == "" {
		out[labelUpdated] = info.Updated.Format(time.RFC3339Nano)
	}
	for k, v := range private {
		if out[k] = v; v == "" {
			delete(out, k)
		}
	}
	return out
}
