# Loads the policy, labels the disk as docs/selinux.md says, and runs the test under the policy.
[ -n "$DASH" ] || DASH=1 exec /usr/bin/dash /script # not busybox, which has programs of its own
set -e
uname -r
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t selinuxfs selinuxfs /sys/fs/selinux
[ -e /etc/hosts ] || echo '127.0.0.1 localhost' > /etc/hosts
[ -e /etc/resolv.conf ] || : > /etc/resolv.conf # CRI copies both for its pods
load_policy -i
echo "selinux: $(getenforce), $(id -Z)"
setfiles -F /etc/selinux/default/contexts/files/file_contexts / 2>&1 | tail -5
cp /repo/bin/containerd-dedup-grpc /usr/local/bin/
sh /label.sh 2>&1 | grep -v libsemanage
semodule -i /dedup-debian.cil 2>&1 | grep -v libsemanage || true
matchpathcon /var/lib/containerd-dedup-grpc/packs/x /var/lib/containerd-dedup-grpc/snapshots/1
restorecon -RF /dev /run
mkdir -p /var/lib/containerd/nodes
chcon -t container_var_lib_t /var/lib/containerd /var/lib/containerd/nodes
chcon -R -t usr_t /cache /repo
chcon -t dockerd_exec_t /cache/tools/*/containerd /cache/tools/*/containerd-shim-runc-v2 /repo/bin/containerd-dedup-grpc
cat > /enforced.sh <<'END'
set -e
cd /repo/integration
export DEDUP_CACHE=/cache DEDUP_SLOW=1 TMPDIR=/var/lib/containerd/nodes
setenforce 1
echo "selinux: $(getenforce), $(id -Z)"
dmesg -c > /dev/null
/repo/bin/dedupctl doctor | grep -A1 SELinux || true
./itest -test.v -test.run '^TestSELinux$' || code=$?
dmesg | grep avc: | tail -60
exit $code
END
runcon system_u:system_r:initrc_t:s0 dash /enforced.sh
