// Package machine boots a fresh Debian machine: its own systemd as process 1, its own file system and its own mounts,
// on this machine's kernel and network. What is installed in it is installed as on a real one.
//
//	<dir>/disk.img    ext4: the machine's changes and its /var/lib
//	<dir>/root        mount point of the machine's root, seen by its processes alone
//	<dir>/boot.log    what systemd says
//
// The root is an overlay over a root file system that debootstrap made once and that stays in the cache. /var/lib is a
// plain ext4, since overlayfs cannot be stacked on overlayfs.
//
// All of it lives in namespaces of process 1: killing that ends every process, mount and loop device.
//
// A cell is less: a command in namespaces of its own on this machine's file system, without systemd and a network.
package machine
