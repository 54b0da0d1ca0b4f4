#!/bin/busybox sh
# Process 1 of the machine: loads the modules, mounts the disk, runs the script on it, and says how it ended.
/bin/busybox mkdir -p /proc /sys /dev /run /tmp /data /sbin /usr/bin
/bin/busybox --install -s /bin
export PATH=/bin HOME=/data
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
ip link set lo up
for module in $(cat /modules/order); do
	insmod "/modules/$module" || echo "vm: $module does not load"
done
fs=$(cat /modules/fs)
if mount -t "$fs" /dev/vda /data; then
	mkdir -p /data/tmp
	cd /data && TMPDIR=/data/tmp sh /data/script </dev/null
	echo "vm: exit $?"
	cd /
	umount /data || mount -o remount,ro /data
fi
poweroff -f
