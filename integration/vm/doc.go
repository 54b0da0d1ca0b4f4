// Package vm runs programs under another kernel: Debian's kernel for clouds in QEMU, on an ext4 of its own. It uses no
// KVM, so that it works in any virtual machine, some ten times slower. What runs there are static programs and
// busybox's commands: there is no Debian in the machine, no network and no clock to rely on.
package vm
