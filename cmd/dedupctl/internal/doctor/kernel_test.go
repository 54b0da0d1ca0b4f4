package doctor

import (
	"errors"
	"strings"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// Where the kernel counts an EROFS file as a stacked file system, doctor says so, and that loop devices are used.
func TestStackingIsTold(t *testing.T) {
	full := errors.New("maximum fs stacking depth exceeded")
	for _, row := range []struct {
		name     string
		features lower.Features
		check    string
		severity Severity
		says     string
	}{
		{"counted", lower.Features{Loop: true, Counted: full}, "kernel.erofs", Info,
			"this kernel counts an EROFS file as a stacked file system"},
		{"counted, and mended", lower.Features{Loop: true, Counted: full}, "kernel.nested", OK, "Docker in Docker"},
		{"not counted", lower.Features{}, "kernel.erofs", OK, "straight from its files"},
		{"no nesting", lower.Features{Nested: full}, "kernel.nested", Warning, full.Error()},
	} {
		t.Run(row.name, func(t *testing.T) {
			var n node
			n.sayKernel(row.features)
			for _, f := range n.findings {
				if f.Check == row.check && f.Severity == row.severity && strings.Contains(f.Message, row.says) {
					return
				}
			}
			t.Errorf("%+v", n.findings)
		})
	}
}

// What is said of overlays in user namespaces is what the try came to.
func TestUserNamespaceIsTold(t *testing.T) {
	for _, row := range []struct {
		err      error
		severity Severity
		says     string
	}{{nil, OK, "can mount overlays"}, {errors.New("dedupctl: no right"), Info, "cannot mount overlays (no right)"}} {
		var n node
		sayUserNamespace(&n, row.err)
		f := n.findings[0]
		if f.Check != "kernel.user-namespaces" || f.Severity != row.severity || !strings.Contains(f.Message, row.says) {
			t.Errorf("%v: %+v", row.err, f)
		}
	}
}
