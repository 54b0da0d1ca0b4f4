// Package powercut cuts the power of a store. It holds tests alone.
//
// # How
//
//	workload (a process of its own): snapshotter.Snapshotter on <disk>
//	      │ operations, each told to the recorder before and after; it answers when it has noted that
//	      ▼
//	ext4 or XFS ─► loop device ─► FUSE file ─► log of writes (offset, bytes) and flushes, in order
//
// A cut is a place in that log. What was written before the last flush is on the disk; of what was written after
// it nothing, all, or any part in units of 4 KiB is. Each cut is built as an image, mounted (which replays the
// file system's journal), opened with the real code, and compared with what clients had been told by then.
//
// # What a cut must show
//
//   - The store opens.
//   - What was acknowledged is there, byte for byte; what was removed is not; what was under way is whole or not there.
//   - Objects and trees hash to their names. There are no trees and no packs that no snapshot needs.
//   - What was under way can be pulled again, and is right.
//
// Loop devices know no FUA, so the block layer makes flushes of it. Writes to one place that no flush divides are kept
// in order, or left out: a disk's cache does not go back in time either.
package powercut
