// Package integration tests the whole system with real parts: containerd, ctr, runc and
// registries on loopback, and the daemon as `make build` leaves it in bin/.
//
// The tests stand in the _test files of this directory, what they are made of in the
// packages below it:
//
//	node      a throw-away containerd and daemon
//	machine   a fresh Debian with its own systemd, and namespaces on this machine's files
//	registry  a registry with an access log
//	image     building layers and images
//	inputs    Debian, Python and busybox file systems, cached
//	torture   layers with every kind of entry
//	rootfs    dumping, comparing and measuring directory trees
//	disk      a file behind a loop device that a test sees through, and may fail
//	powercut  cutting the power of a store after any flush of its disk (tests only)
//	tools     go.mod files of the programs that are built from the Go module proxy
//
// Each test has a node of its own and may run beside others. They need root, and skip by
// name without; `make test` installs what else they need.
package integration
