package integration

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/machine"
)

// The Debian package installs, runs, is upgraded under a running container and removed, by dpkg and systemd of a fresh
// Debian.
func TestDebianPackage(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("dpkg-deb"); err != nil {
		t.Skip("needs dpkg-deb: only Debian and its like have it")
	}
	m := bootContainerd(t, addPackages)
	run := func(script string) string {
		t.Helper()
		out, err := m.Run(testContext(t), script)
		if err != nil {
			log, _ := m.Run(testContext(t), "journalctl -n 40 -u containerd-dedup-grpc")
			t.Fatal(err, log)
		}
		return out
	}
	// What removing leaves everywhere else than in the store is nothing.
	const files = "for d in /etc /usr /run/containerd-dedup-grpc /var/lib/containerd-dedup-grpc /var/lib/systemd; do " +
		"[ ! -e $d ] || find $d -xdev -not -path '/etc/containerd*'; done | sort"
	run(files + " > before")
	run("dpkg -i old.deb")
	if out := run("systemctl is-active containerd-dedup-grpc; systemctl is-enabled containerd-dedup-grpc; dpkg -V " +
		"containerd-dedup-grpc"); out != "active\nenabled\n" {
		t.Errorf("after the installation: %q", out)
	}
	run(`dedupctl config containerd --write --yes
systemctl restart containerd
ctr image pull --snapshotter dedup docker.io/library/python:3.12
ctr run --detach --snapshotter dedup docker.io/library/python:3.12 one sleep 1000
echo 'log_level = "debug"' >> /etc/containerd-dedup-grpc/config.toml`)

	run("dpkg -i new.deb")
	out := run(`tail -n 1 /etc/containerd-dedup-grpc/config.toml
dpkg-query -f '${Version}\n' -W containerd-dedup-grpc; systemctl is-active containerd-dedup-grpc
ctr task exec --exec-id e one sh -c 'echo lives; cat /usr/bin/python3 | wc -c'`)
	if !strings.HasPrefix(out, "log_level = \"debug\"\n1.0.1\nactive\nlives\n") {
		t.Errorf("after the upgrade: %q", out)
	}
	run("systemctl disable containerd-dedup-grpc; dpkg -i new.deb")
	if out := run("systemctl is-enabled containerd-dedup-grpc || true"); out != "disabled\n" {
		t.Errorf("an upgrade enables what was disabled: %q", out)
	}

	run("dedupctl config containerd --remove --yes; systemctl restart containerd; dpkg -r containerd-dedup-grpc")
	out = run(`systemctl is-active containerd-dedup-grpc || true; ls /etc/containerd-dedup-grpc
ctr task exec --exec-id f one sh -c 'echo lives; cat /usr/bin/python3 > /dev/null'`)
	if out != "inactive\nconfig.toml\nlives\n" {
		t.Errorf("after the removal: %q", out)
	}
	out = run("dpkg -P containerd-dedup-grpc")
	if !strings.Contains(out, "/var/lib/containerd-dedup-grpc stays") {
		t.Errorf("purging says %q", out)
	}
	run("ctr task delete --force one")
	// as it says
	run("(cd /run/containerd-dedup-grpc && umount -q chains/* p/* v/*) || true ; " +
		"rm -r /var/lib/containerd-dedup-grpc /run/containerd-dedup-grpc")
	run(files + " > after")
	if out := run("diff before after || true"); out != "" {
		t.Errorf("the package leaves files:\n%s", out)
	}
}

// addPackages puts packages of two versions into root's home.
func addPackages(t *testing.T, opts *machine.Options) {
	t.Helper()
	src := copySource(t)
	run := func(name string, args ...string) {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Dir = src
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
	}
	run("make", "deb", "VERSION=v1.0.0", "COMMANDS=containerd-dedup-grpc dedupctl")
	debs, err := filepath.Glob(filepath.Join(src, "out/containerd-dedup-grpc_1.0.0_*.deb"))
	must(t, err)
	if len(debs) != 1 {
		t.Fatalf("packages: %v", debs)
	}
	control := filepath.Join(src, "out/deb/DEBIAN/control")
	run("sed", "-i", "s/^Version: .*/Version: 1.0.1/", control)
	run("dpkg-deb", "--root-owner-group", "-Znone", "--build", "out/deb", "out/new.deb")
	opts.Binds = append(opts.Binds, machine.Bind{Source: debs[0], Target: "/root/old.deb"},
		machine.Bind{Source: filepath.Join(src, "out/new.deb"), Target: "/root/new.deb"})
}
