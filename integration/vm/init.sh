#!/bin/busybox sh
# Process 1 of the machine: loads the modules, mounts the disk, runs the script on it, and says how it ended.
/bin/busybox mkdir -p /proc /sys /dev /run /tmp /data /sbin /usr/bin
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin:/usr/sbin HOME=/data
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
	if [ -e /modules/root ]; then
		mkdir -p /data/bin /data/proc /data/sys /data/dev /data/run /data/etc /data/root
		[ -e /data/bin/busybox ] || cp /bin/busybox /data/bin/
		cp /script /data/script
		mount -t cgroup2 cgroup /sys/fs/cgroup
		mkdir -p /dev/pts /dev/shm
		mount -t devpts devpts /dev/pts
		for dir in proc sys dev run; do mount --move "/$dir" "/data/$dir"; done
		cat > /data/init <<'END'
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin:/usr/sbin HOME=/root TMPDIR=/tmp
cd / && sh /script </dev/null
echo "vm: exit $?"
sync
mount -o remount,ro /
poweroff -f
END
		chmod +x /data/init
		exec switch_root /data /init
	fi
	cd /data && TMPDIR=/data/tmp sh /script </dev/null
	echo "vm: exit $?"
	cd /
	umount /data || mount -o remount,ro /data
fi
poweroff -f
