package integration

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/machine"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
)

// A fresh Debian that runs containerd, and a person who does what docs/quickstart.md says, command by command, and then
// what docs/operations.md says to be rid of it again. Two things are made to be as if there were a network: docker.io
// is answered for on loopback, and Go's modules are there. The build starts from an empty cache with DEDUP_LONG=1.
func TestQuickstart(t *testing.T) {
	t.Parallel()
	steps := commands(t, "docs/quickstart.md", "# Quick start")
	if d := cmp.Diff(steps, commands(t, "README.md", "## Use it")); d != "" {
		t.Errorf("commands in docs/quickstart.md and README.md: %s", d)
	}
	m := bootContainerd(t, addSource)
	start := time.Now()
	for _, step := range steps {
		switch out := follow(t, m, step); {
		case strings.Contains(step, "ctr run") && !strings.HasSuffix(out, "hello\n"):
			t.Errorf("the container says %q", out)
		case strings.Contains(step, "dedupctl status") && !strings.Contains(out, "/var/lib/containerd-dedup-grpc"):
			t.Errorf("status says %q", out)
		}
	}
	t.Logf("all of it took %s", time.Since(start).Round(time.Second))
	checkHardened(t, m)
	goBack(t, m)
}

// The same where no unit starts the daemon or containerd.
func TestQuickstartWithoutSystemd(t *testing.T) {
	t.Parallel()
	m := bootContainerd(t, addSource)
	byHand := func() (pid string) {
		return strings.TrimSpace(follow(t, m, "setsid containerd </dev/null >>/var/log/containerd.log 2>&1 & echo $!"))
	}
	answers := "timeout 60 sh -c 'until ctr version >/dev/null 2>&1; do sleep 0.1; done'"
	follow(t, m, "systemctl disable --now --quiet containerd")
	pid := byHand()
	follow(t, m, answers)
	for _, step := range commands(t, "docs/quickstart.md", "## Without systemd") {
		if step == "make build" { // TestQuickstart does
			bin := filepath.Join(m.Path("/root/dedup-snapshotter"), "bin")
			must(t, os.Mkdir(bin, 0o755))
			for _, name := range []string{"containerd-dedup-grpc", "dedupctl"} {
				installBinary(t, filepath.Join(bin, name))
			}
			continue
		}
		follow(t, m, step)
	}
	follow(t, m, "kill "+pid+"; timeout 60 sh -c 'while kill -0 "+pid+" 2>/dev/null; do sleep 0.1; done'")
	byHand()
	follow(t, m, answers)
	for _, step := range commands(t, "docs/quickstart.md", "# Quick start") {
		if !strings.Contains(step, "ctr ") && !strings.Contains(step, "dedupctl status") {
			continue
		}
		if out := follow(t, m, step); strings.Contains(step, "ctr run") && !strings.HasSuffix(out, "hello\n") {
			t.Errorf("the container says %q", out)
		}
	}
}

// follow does what a page says, in the repository's directory.
func follow(t *testing.T, m *machine.Machine, step string) string {
	t.Helper()
	out, err := m.Run(testContext(t), "cd dedup-snapshotter\n"+step)
	if strings.Contains(step, "image pull") {
		out = "" // a hundred lines of progress
	}
	t.Logf("$ %s\n%s", step, out)
	if err != nil {
		log, _ := m.Run(testContext(t),
			"systemctl status containerd containerd-dedup-grpc; journalctl -n 40 -u containerd -u containerd-dedup-grpc")
		t.Fatalf("%v\n%s", err, log)
	}
	return out
}

// goBack has fsck run by a timer and then removes dedup, as docs/operations.md says, while a container runs. Nothing of
// it is left, and the image is there.
func goBack(t *testing.T, m *machine.Machine) {
	t.Helper()
	for _, step := range commands(t, "docs/operations.md", "## Damage") {
		follow(t, m, step)
	}
	if out := follow(t, m, "systemctl start dedup-fsck.service; systemctl is-active dedup-fsck.timer; systemctl "+
		"disable --now --quiet dedup-fsck.timer; rm /etc/systemd/system/dedup-fsck.*"); out != "active\n" {
		t.Errorf("the timer is %q", out)
	}
	const image = "docker.io/library/python:3.12"
	steps := commands(t, "docs/operations.md", "## Removal, back to overlayfs")
	follow(t, m, "ctr run --detach --snapshotter dedup "+image+
		" kept sleep 1000; ctr task exec --exec-id a kept sh -c 'echo mine > /mine'")
	follow(t, m, steps[0])
	if out := follow(t, m, "ctr run --rm --snapshotter overlayfs "+image+" new python3 -c 'print(1)'; ctr task exec "+
		"--exec-id b kept sh -c 'cat /mine; wc -c < /usr/bin/python3'"); !strings.HasPrefix(out, "1\nmine\n") {
		t.Errorf("after %s: %q", steps[0], out)
	}
	// It is made anew.
	follow(t, m, "ctr task delete --force kept; ctr container delete kept")
	if out := follow(t, m, "ctr snapshot --snapshotter dedup ls | grep -c Active || true"); out != "0\n" {
		t.Errorf("%s snapshots are still used", out)
	}
	for _, step := range steps[1:] {
		follow(t, m, step)
	}
	// containerd removes snapshots meanwhile.
	out := follow(t, m, `ctr run --rm --snapshotter overlayfs `+image+` new python3 -c 'print(2)'
grep containerd-dedup-grpc /proc/mounts || true
find /etc /usr /run /var/lib -xdev -name '*dedup*' -not -path '/etc/containerd-dedup-grpc*' 2>/dev/null || true`)
	if out != "2\n" {
		t.Errorf("left after the removal: %q", out)
	}
}

// checkHardened looks at what systemd made of the unit: few capabilities, and containerd's mount namespace.
func checkHardened(t *testing.T, m *machine.Machine) {
	t.Helper()
	out, err := m.Run(testContext(t), `
pid=$(systemctl show -P MainPID containerd-dedup-grpc)
containerd=$(systemctl show -P MainPID containerd)
[ "$(readlink /proc/$pid/ns/mnt)" = "$(readlink /proc/$containerd/ns/mnt)" ] ||
	echo "another mount namespace than containerd's"
grep -q '^Seccomp:.2$' /proc/$pid/status || echo "may make any system call"
grep -q '^NoNewPrivs:.1$' /proc/$pid/status || echo "may gain privileges"
capsh=$(sed -n 's/^CapBnd:.//p' /proc/$pid/status)
[ $((0x$capsh & (1 << 16 | 1 << 23 | 1 << 19))) = 0 ] || echo "may load modules, trace or change priorities: $capsh"
stat -c '%a %U' /run/containerd-dedup-grpc /var/lib/containerd-dedup-grpc \
	/run/containerd-dedup-grpc/containerd-dedup-grpc.sock
systemd-analyze verify containerd-dedup-grpc.service 2>&1`)
	if want := "700 root\n700 root\n600 root\n"; err != nil || out != want {
		t.Errorf("the unit: %q, %v, want %q", out, err, want)
	}
}

// bootContainerd boots a machine on which containerd runs, and where docker.io has an image of Python; add puts more
// into it.
func bootContainerd(t *testing.T, add func(*testing.T, *machine.Options)) *machine.Machine {
	t.Helper()
	return bootMachine(t, func(t *testing.T, o *machine.Options) {
		r := startRegistry(t)
		standInForDockerHub(t, r, o)
		add(t, o)
		pushPython(t, r)
	})
}

// bootMachine boots a machine on which containerd runs; add puts more into it.
func bootMachine(t *testing.T, add func(*testing.T, *machine.Options)) *machine.Machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: namespaces and mounts do")
	}
	ctx := testContext(t)
	say := func(s string) { t.Log(s) }
	tools, err := node.Build(ctx, node.DefaultVersion, say)
	must(t, err)
	opts := machine.Options{Dir: t.TempDir(), Say: say, Files: map[string]string{
		"/etc/systemd/system/containerd.service": containerdUnit,
	}}
	for _, bin := range []string{"containerd", "ctr", "containerd-shim-runc-v2"} {
		opts.Binds = append(opts.Binds, machine.Bind{Source: filepath.Join(tools.Dir, bin), Target: "/usr/local/bin/" + bin})
	}
	add(t, &opts)
	m, err := machine.Boot(ctx, opts)
	must(t, err)
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	_, err = m.Run(ctx, "systemctl enable --now --quiet containerd")
	must(t, err)
	return m
}

const containerdUnit = `[Unit]
Description=containerd
After=network.target local-fs.target
[Service]
Type=notify
ExecStart=/usr/local/bin/containerd
Delegate=yes
KillMode=process
Restart=always
[Install]
WantedBy=multi-user.target
`

// copySource copies the files of the repository, as they are now.
func copySource(t *testing.T) string {
	t.Helper()
	root, err := node.ModuleRoot()
	must(t, err)
	list := exec.Command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	list.Dir = root
	names, err := list.Output()
	must(t, err)
	src := t.TempDir()
	for name := range strings.SplitSeq(strings.TrimRight(string(names), "\x00"), "\x00") {
		data, err := os.ReadFile(filepath.Join(root, name))
		if os.IsNotExist(err) {
			continue // deleted, and not yet committed
		}
		must(t, err)
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(src, name)), 0o755))
		must(t, os.WriteFile(filepath.Join(src, name), data, 0o644))
	}
	return src
}

// addSource puts the repository into root's home, and Go with the modules into the machine.
func addSource(t *testing.T, opts *machine.Options) {
	t.Helper()
	env := func(name string) string {
		out, err := exec.Command("go", "env", name).Output()
		must(t, err)
		return string(bytes.TrimSpace(out))
	}
	cache := env("GOCACHE")
	if os.Getenv("DEDUP_LONG") != "" {
		cache = t.TempDir()
	}
	opts.Binds = append(opts.Binds,
		machine.Bind{Source: copySource(t), Target: "/root/dedup-snapshotter", Writable: true},
		machine.Bind{Source: env("GOROOT"), Target: "/usr/local/go"},
		machine.Bind{Source: env("GOMODCACHE"), Target: "/root/go/pkg/mod"},
		machine.Bind{Source: cache, Target: "/root/.cache/go-build", Writable: true},
	)
	opts.Env = append(opts.Env, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/go/bin",
		"GOFLAGS=-buildvcs=false", "GOTOOLCHAIN=local", "GOMAXPROCS="+strconv.Itoa(runtime.GOMAXPROCS(0)))
}

// pushPython pushes Debian with Python under the name that the documentation pulls.
func pushPython(t *testing.T, r *registry.Registry) {
	t.Helper()
	set, err := inputs.Open(func(s string) { t.Log(s) })
	must(t, err)
	debian, err := set.Debian(testContext(t))
	must(t, err)
	push(t, r, "library/python:3.12", debian)
}

// commands returns the shell commands of a Markdown file's blocks, or of one of its sections': one element for each
// line.
func commands(t *testing.T, file string, section ...string) (lines []string) {
	t.Helper()
	root, err := node.ModuleRoot()
	must(t, err)
	data, err := os.ReadFile(filepath.Join(root, file))
	must(t, err)
	text := string(data)
	for _, s := range section {
		_, after, ok := strings.Cut("\n"+text, "\n"+s+"\n")
		if !ok {
			t.Fatalf("%s has no section %q", file, s)
		}
		text, _, _ = strings.Cut(after, "\n## ")
	}
	for _, m := range regexp.MustCompile("(?ms)^```sh\n(.*?)^```$").FindAllStringSubmatch(text, -1) {
		for line := range strings.Lines(m[1]) {
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
				lines = append(lines, line)
			}
		}
	}
	if len(lines) == 0 {
		t.Fatalf("%s %v has no commands", file, section)
	}
	return lines
}
