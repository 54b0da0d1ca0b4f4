package lower

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// userNamespaceArgs has the test run itself as the program that UserNamespace starts.
const userNamespaceArgs = "DEDUP_TEST_USER_NAMESPACE"

// Whether an overlay can be mounted in a user namespace is found out by a program in one. It is in another namespace
// than the test, and what it says comes back.
func TestUserNamespace(t *testing.T) {
	if args := os.Getenv(userNamespaceArgs); args != "" {
		dirs := strings.Split(args, ":")
		if err := MountAsUser(dirs[0], dirs[1], dirs[2], dirs[3]); err != nil {
			t.Fatal(err)
		}
		return
	}
	needsMounts(t)
	root := t.TempDir()
	f, err := Examine(root)
	if err != nil || f.Erofs != nil || f.Upper != nil {
		t.Skip(err, f.Erofs, f.Upper)
	}
	self := func(args ...string) *exec.Cmd {
		cmd := exec.Command("/proc/self/exe", "-test.run", "^TestUserNamespace$")
		cmd.Env = append(os.Environ(), userNamespaceArgs+"="+strings.Join(args, ":"))
		return cmd
	}
	if err := f.UserNamespace(root, self); err != nil {
		t.Logf("this kernel cannot: %v", err)
	}
	before, err := os.Readlink("/proc/self/ns/user")
	if err != nil {
		t.Fatal(err)
	}
	says := func(script string) func(...string) *exec.Cmd {
		return func(...string) *exec.Cmd { return exec.Command("/bin/sh", "-c", script) }
	}
	if err := f.UserNamespace(root, says("readlink /proc/self/ns/user >&2; exit 1")); err == nil ||
		!strings.HasPrefix(err.Error(), "user:[") || err.Error() == before {
		t.Errorf("the program is in %v, the test in %s", err, before)
	}
	if err := f.UserNamespace(root, says("exit 1")); err == nil {
		t.Error("a program that fails without a word is no error")
	}
	if left, err := os.ReadDir(root); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
