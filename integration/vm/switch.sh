# One boot of a node whose store stays. The test sets before it: import and run are images, again is yes where the
# container starts, coarse is yes where no dense pack is to be left, full is yes where the disk is filled up before the
# container's first start. What it says begins with "switch: ".
set -e
uname -r
PATH="$PATH:/repo/bin:$(echo /cache/tools/containerd-*)"
say() { echo "switch: $1=$2"; }
# each prints the files of a directory, with the logarithm of their blocks, which EROFS has at byte 1036.
each() {
	for f in /store/"$1"/*.erofs; do
		[ ! -e "$f" ] || echo -n "$(basename "$f" .erofs | cut -c1-13):$(hexdump -s 1036 -n 1 -e '1/1 "%d"' "$f") "
	done
}
mkdir -p /tmp /run/containerd-dedup-grpc /etc/containerd
cat > /dedup.toml <<'END'
root = "/store"
reserve_space = "64MiB"
END
cat > /etc/containerd/config.toml <<'END'
version = 3
root = "/containerd-root"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]
imports = ["/containerd-dedup.toml"]
END
dedupctl config containerd --containerd-version 2.4.2 > /containerd-dedup.toml
say found "$(each packs)"
free=0
if [ "$full" = yes ]; then
	free=$(($(stat -f -c '%a * %S' /) - (64 + 12) * 1024 * 1024))
	fallocate -l "$free" /fill
fi
containerd-dedup-grpc --config /dedup.toml > /dedup.log 2>&1 &
pids=$!
containerd > /containerd.log 2>&1 &
pids="$pids $!"
fail() { tail -20 /dedup.log /containerd.log; exit 1; }
for i in $(seq 240); do
	ctr version > /dev/null 2>&1 && break
	kill -0 $pids || fail
	sleep 1
done
for image in $import; do
	ctr image import --snapshotter dedup "/$image.tar" > /dev/null || fail
done
[ -e /created ] || ctr container create --snapshotter dedup docker.io/test/a:1 again sh -c '
	echo boot >> /boots
	[ "$(wc -l < /boots)" != 1 ] || echo changed >> /data/0000
	echo "switch: boots=$(wc -l < /boots)"
	echo "switch: again=$(cat /data/* | md5sum | cut -c1-32)"'
touch /created
if [ "$full" = yes ]; then
	say refused "$(ctr task start again 2>&1 | tr '\n' ' ')"
	ctr task rm again > /dev/null 2>&1 || true
	say kept "$(each packs)"
	say fsck-full "$(dedupctl fsck > /fsck.log 2>&1 && echo clean || cat /fsck.log)"
	rm /fill
fi
ctr task start again || fail
ctr task rm again 2> /dev/null || true
say served "$(each packs)"
for image in $run; do
	ctr run --rm --snapshotter dedup "docker.io/test/$image:1" new \
		sh -c 'echo "switch: image=$0 $(cat /data/* | md5sum | cut -c1-32)"' "$image" || fail
done
for i in $(seq 120); do
	[ "$coarse" = yes ] && each packs | grep -q ':9 ' || break
	sleep 1
done
sleep 5
dedupctl doctor 2>&1 | sed -n 's/.*mode: \([a-z]*, [a-z]*\).*/switch: mode=\1/p'
say packs "$(each packs)"
say chains "$(each chains)"
say fsck "$(dedupctl fsck > /fsck.log 2>&1 && echo clean || cat /fsck.log)"
kill $pids
wait
