// Package bench takes snapshotters through scenarios on real containerds and measures what
// it costs: clocks, /proc and the file system are asked, never a snapshotter.
//
// # Words
//
//   - subject: one snapshotter under one setting.
//   - scenario: what is measured, by the name that the command line uses.
//   - group: scenarios that share a trial, since one needs what another leaves behind.
//   - trial: one subject taken once through one group, on a fresh containerd and a fresh disk.
//   - sample: one figure of one trial; package report makes medians of them.
//
// Trials of different subjects are interleaved. Whatever a trial made (mounts, loop
// devices, processes, directories) is gone when it ends, also when it is interrupted; what
// a killed benchmark left is swept by the next one.
package bench
