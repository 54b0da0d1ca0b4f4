# An image comes in through a real containerd, is damaged, and heals.
set -e
uname -r
mkdir -p /run/containerd-dedup-grpc /etc/containerd mnt
cat > dedup.toml <<'END'
root = "/data/store"
verity = "on"
END
cat > /etc/containerd/config.toml <<'END'
version = 3
root = "/data/containerd-root"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]
imports = ["/data/containerd-dedup.toml"]
# Nothing holds the views below, and it would collect them.
[plugins."io.containerd.gc.v1.scheduler"]
  startup_delay = "1h"
  schedule_delay = "1h"
END
./dedupctl config containerd --containerd-version 2.4.2 > containerd-dedup.toml
./containerd-dedup-grpc --config dedup.toml > dedup.log 2>&1 &
pids=$!
./containerd > containerd.log 2>&1 &
pids="$pids $!"
for i in $(seq 120); do
	./ctr version > /dev/null 2>&1 && break
	kill -0 $pids && sleep 1
done
snapshots() { ./ctr snapshot --snapshotter dedup "$@"; }
show() {
	snapshots view view "$(snapshots ls | awk '$2 == "Committed" { print $1 }')" || return 0
	snapshots mounts /data/mnt view | grep -e "-t overlay" | sh -x
	chroot mnt /bin/busybox md5sum /payload && echo "payload: read" || echo "payload: error"
	umount mnt
	snapshots rm view
}
./ctr image import --snapshotter dedup image.tar > /dev/null || { tail -20 dedup.log containerd.log; exit 1; }
./dedupctl status
show
object=store/objects/$(sha256sum payload | cut -c1-2)/$(sha256sum payload | cut -c3-64)
tr a b < payload > other && chmod 400 other && mv other "$object"
show
./dedupctl fsck --repair || echo "fsck: $?"
show
kill $pids
wait
