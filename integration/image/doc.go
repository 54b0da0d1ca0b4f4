// Package image builds OCI images out of tar members and directories, streaming: a
// layer goes through a pipe into a blob file and is never held in memory.
//
// # Words
//
//   - entry: one tar member to be written, as the author of a test wants it, sound or not.
//   - layer: a blob file with its digest, diffID and media type.
//
// It writes tars the way Docker does (PAX, whole seconds, sorted walk) unless an entry
// says otherwise, and knows nothing of containerd.
package image
