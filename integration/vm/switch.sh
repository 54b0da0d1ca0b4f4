# One boot of a node whose store stays: the container starts again, and says how often it did.
set -e
uname -r
PATH="$PATH:/repo/bin:$(echo /cache/tools/containerd-*)"
mkdir -p /tmp /run/containerd-dedup-grpc /etc/containerd
cat > /dedup.toml <<'END'
root = "/store"
END
cat > /etc/containerd/config.toml <<'END'
version = 3
root = "/containerd-root"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]
imports = ["/containerd-dedup.toml"]
END
dedupctl config containerd --containerd-version 2.4.2 > /containerd-dedup.toml
containerd-dedup-grpc --config /dedup.toml > /dedup.log 2>&1 &
pids=$!
containerd > /containerd.log 2>&1 &
pids="$pids $!"
for i in $(seq 120); do
	ctr version > /dev/null 2>&1 && break
	kill -0 $pids || { tail -20 /dedup.log /containerd.log; exit 1; }
	sleep 1
done
if [ ! -e /imported ]; then
	ctr image import --snapshotter dedup /image.tar > /dev/null || { tail -20 /dedup.log /containerd.log; exit 1; }
	ctr container create --snapshotter dedup docker.io/test/image:1 again sh -c \
		'echo boot >> /boots; echo "switch: boots=$(wc -l < /boots)"; md5sum /payload'
	touch /imported
fi
ctr task start again || { tail -20 /dedup.log /containerd.log; exit 1; }
ctr task rm again || true
ctr run --rm --snapshotter dedup docker.io/test/image:1 new md5sum /payload
sleep 5
dedupctl doctor 2>&1 | sed -n 's/.*mode: \([a-z]*, [a-z]*\).*/switch: mode=\1/p'
echo "switch: packs=$(cd /store/packs && stat -c '%n %s %Y' *.erofs | md5sum | cut -c1-12)"
echo "switch: chains=$(cd /store/chains && md5sum *.erofs | md5sum | cut -c1-12)"
kill $pids
wait
