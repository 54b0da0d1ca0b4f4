# Process 1 of a cell, in fresh namespaces. Arguments: a directory, the cgroup controllers, and the command to run.
set -eu
dir=$1 controllers=$2
shift 2
resolv=$(cat /etc/resolv.conf 2>/dev/null || true)
mount -t proc proc /proc
mount -t sysfs sysfs /sys
cgroups=/sys/fs/cgroup
if [ "$controllers" = 2 ]; then
	mount -t cgroup2 cgroup "$cgroups"
else
	mount -t tmpfs -o mode=755 tmpfs "$cgroups"
	for c in $controllers; do
		mkdir "$cgroups/${c#name=}"
		mount -t cgroup -o "$c" cgroup "$cgroups/${c#name=}"
	done
fi
for part in etc opt usr/local/bin; do
	mkdir -p "$dir/cell/$part/upper" "$dir/cell/$part/work" "/$part"
	mount -t overlay overlay -o "lowerdir=/$part,upperdir=$dir/cell/$part/upper,workdir=$dir/cell/$part/work" "/$part"
done
# No overlay: snapshotters have their roots there.
mkdir -p "$dir/cell/lib"
for have in /var/lib/*/; do
	case $have in /var/lib/cni/ | /var/lib/containerd*) continue ;; esac
	mkdir "$dir/cell/lib/$(basename "$have")"
	mount --bind "$have" "$dir/cell/lib/$(basename "$have")"
	mount -o remount,bind,ro "$dir/cell/lib/$(basename "$have")"
done
mount --rbind "$dir/cell/lib" /var/lib
mount -t tmpfs -o mode=755 tmpfs /run
rm -f /etc/resolv.conf
echo "$resolv" >/etc/resolv.conf
mount --make-rshared /
# What this process was given unasked would reach all others, whose pipes a suite counts.
for fd in /proc/self/fd/*; do
	fd=${fd##*/}
	[ "$fd" -le 2 ] || eval "exec $fd>&-"
done
# A shell also collects the processes whose parents have ended.
"$@" &
wait $!
