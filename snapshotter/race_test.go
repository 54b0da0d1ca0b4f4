//go:build race

package snapshotter

// raceDetector: processes that are killed find no races, and take five times as long. They run without it.
const raceDetector = true
