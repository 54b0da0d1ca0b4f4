#!/bin/sh
# Labels the files of dedup for SELinux, as containerd's own are labelled by the policy (Fedora's container-selinux,
# Debian's selinux-policy-default). Run it as root: once after the installation, before the daemon starts, and again
# with the path when root is another one. It needs semanage (policycoreutils-python-utils).
set -eu
root=${1:-/var/lib/containerd-dedup-grpc}
run=/run/containerd-dedup-grpc
daemon=$(command -v containerd-dedup-grpc || echo /usr/local/bin/containerd-dedup-grpc)

# like PATH OTHER: files below PATH get the labels that the policy has for those below OTHER.
like() {
	semanage fcontext -a -e "$2" "$1" 2>/dev/null || semanage fcontext -m -e "$2" "$1"
}
like "$root" /var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots
like "$run" /run/containerd
like "$daemon" /usr/bin/containerd
mkdir -p -m 0700 "$root" "$run"
restorecon -RF "$root" "$run" "$daemon"
ls -dZ "$root" "$run" "$daemon"
