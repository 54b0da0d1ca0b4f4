package snapshotter

import (
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// target is what a Prepare for extraction says about the layer to be unpacked. All of
// it but chain may come from image annotations, that is, from an attacker.
type target struct {
	chain content.ChainID // the chainID that the commit will get
	// parent is the chainID of the layers below, zero when there are none.
	parent content.ChainID
	// parentKnown is false when the chainID of the layers below cannot be told.
	parentKnown bool
	// rebase means that the parent will be given to Commit, not to Prepare.
	rebase bool
	hint   string // the diffID label
}

// newTarget reads the labels of a Prepare. ok is false when it has no chainID to aim at.
func newTarget(parent string, labels map[string]string) (t target, ok bool) {
	sum, err := content.ParseSum(labels[snapshots.LabelSnapshotRef])
	if err != nil {
		return target{}, false
	}
	t = target{chain: content.ChainID{Sum: sum}, hint: labels[labelDiffID]}
	switch {
	case parent != "":
		t.parent, t.parentKnown = chainOfName(parent)
	case labels[labelParentChain] != "":
		sum, err := content.ParseSum(labels[labelParentChain])
		t.parent, t.parentKnown, t.rebase = content.ChainID{Sum: sum}, err == nil, true
	default:
		t.parentKnown = true
	}
	return t, true
}

// chainOfName returns the chainID that names a committed snapshot. containerd hands
// names to a proxy as "<namespace>/<sequence>/<name>".
func chainOfName(name string) (content.ChainID, bool) {
	base := name[strings.LastIndexByte(name, '/')+1:]
	if !strings.HasPrefix(base, "sha256:") {
		return content.ChainID{}, false
	}
	sum, err := content.ParseSum(base)
	return content.ChainID{Sum: sum}, err == nil
}

// diffID returns the diffID that makes the target's chainID out of its parent's, and so
// is proven by sha256: the hinted one if it fits, else one that infer knows. warning
// tells of a hint that does not fit.
func (t target) diffID(infer func(parent, chain content.ChainID) (content.DiffID, bool)) (d content.DiffID, ok bool, warning string) {
	if !t.parentKnown {
		return content.DiffID{}, false, ""
	}
	if t.hint != "" {
		sum, err := content.ParseSum(t.hint)
		d := content.DiffID{Sum: sum}
		if err == nil && t.parent.Chain(d) == t.chain {
			return d, true, ""
		}
		warning = fmt.Sprintf("label %s=%q does not lead from chain %q to chain %s: ignored", labelDiffID, t.hint, parentText(t.parent), t.chain)
	}
	if t.parent.IsZero() {
		return content.DiffID(t.chain), true, warning
	}
	d, ok = infer(t.parent, t.chain)
	return d, ok, warning
}

func parentText(c content.ChainID) string {
	if c.IsZero() {
		return ""
	}
	return c.Hex()
}
