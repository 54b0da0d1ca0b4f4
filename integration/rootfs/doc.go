// Package rootfs looks at directory trees the way a container would: Dump records all
// that can be seen of a root file system, Diff says in words how two of them differ,
// and Usage counts what a directory costs on its file system.
//
// It changes nothing, and it trusts nobody's accounting: only lstat, readlink, the
// xattr calls and the bytes that read returns.
package rootfs
