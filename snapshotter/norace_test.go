//go:build !race

package snapshotter

const raceDetector = false
