package lower

import (
	"os"
	"slices"
	"testing"
)

// Where SELinux is off, mounts have no label. With it, integration/vm tests them.
func TestLabelled(t *testing.T) {
	options := []string{"device=/a"}
	b, err := os.ReadFile("/sys/fs/selinux/enforce")
	if got := labelled(options); (err == nil) != (len(got) > 1) || !slices.Equal(options, got[:1]) {
		t.Errorf("selinuxfs says %q, %v: %q", b, err, got)
	}
	if takes("nobody:nothing:nowhere:s0") {
		t.Error("the kernel takes any label")
	}
}
