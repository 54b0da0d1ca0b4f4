# Runs in fresh namespaces: makes the machine's root and becomes its process 1.
# Arguments: the machine's directory, the root file system below, the cgroup controllers, and for each bind its mode,
# source and target.
set -eu
dir=$1 lower=$2 controllers=$3
shift 3
root=$dir/root disk=$dir/disk
mount -o loop "$dir/disk.img" "$disk"
mkdir "$disk/upper" "$disk/work"
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$disk/upper,workdir=$disk/work" "$root"
cp -a "$root/var/lib" "$disk/lib"
mount --bind "$disk/lib" "$root/var/lib"
cp -a "$dir/files/." "$root/"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
cgroups=$root/sys/fs/cgroup
if [ "$controllers" = 2 ]; then
	mount -t cgroup2 cgroup "$cgroups"
	version=
else
	mount -t tmpfs -o mode=755 tmpfs "$cgroups"
	for c in $controllers; do
		mkdir "$cgroups/${c#name=}"
		mount -t cgroup -o "$c" cgroup "$cgroups/${c#name=}"
	done
	version="systemd.unified_cgroup_hierarchy=0 systemd.legacy_systemd_cgroup_controller=1"
fi
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for node in null zero full random urandom tty loop-control $(cd /dev && echo loop[0-9]* fuse); do
	[ ! -e "/dev/$node" ] || { touch "$root/dev/$node" && mount --bind "/dev/$node" "$root/dev/$node"; }
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
rm -f "$root/etc/resolv.conf"
cp /etc/resolv.conf "$root/etc/resolv.conf" 2>/dev/null || true
while [ $# -gt 0 ]; do
	if [ -d "$2" ]; then mkdir -p "$root$3"; else mkdir -p "$(dirname "$root$3")" && touch "$root$3"; fi
	mount --bind "$2" "$root$3"
	[ "$1" = rw ] || mount -o remount,bind,ro "$root$3"
	shift 3
done
cd "$root"
mkdir oldroot
pivot_root . oldroot
umount -l /oldroot
rmdir /oldroot
mount --make-rshared /
hostname localhost
exec env -i container=dedup-machine PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system --log-target=console --show-status=no $version
