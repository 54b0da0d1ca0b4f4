// Package node runs a real containerd, with or without the dedup daemon, as one
// throw-away node: below one temporary directory, on unix sockets only, beside any
// number of others.
//
// # Words
//
//   - node: one containerd with its own root, state and socket, and the things that
//     hang on it: shims, containers, the dedup daemon.
//   - tools: containerd, ctr and the runc shim of one version, built from the Go
//     module proxy by the small modules in integration/tools.
//   - cache: the directory that outlives nodes and holds tools and inputs
//     (DEDUP_CACHE, else $XDG_CACHE_HOME/dedup-snapshotter, else
//     ~/.cache/dedup-snapshotter). Deleting it costs time and nothing else.
//
// # On disk, below the node's directory
//
//	owner             pid of the process that made it; a dead owner's node is swept
//	bin/              all that containerd and the daemon find in PATH
//	containerd.toml   dedup.toml
//	c/                containerd's root (c/io.containerd.snapshotter.v1.overlayfs, ...)
//	s/                containerd's state
//	runc/             runc's state
//	dedup/            the dedup daemon's root
//	run/              the dedup daemon's socket and mount points
//	log/              one file for each process
//	tmp/              TMPDIR of everything
//
// # Invariants
//
//   - Close leaves nothing behind: no process, no mount, no file. It ends only
//     processes that belong to the node, each by its pid.
//   - All snapshotters are measured under the same conditions: neither containerd nor
//     the daemon finds igzip or unpigz, which containerd would use where they happen to
//     be installed, unless Options.ExternalGzip asks for them.
//   - Nothing listens on a network address.
package node
