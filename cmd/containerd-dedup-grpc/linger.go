package main

import (
	"fmt"
	"time"
)

// lingerMost is the largest keep_mounted.
const lingerMost = time.Hour

// linger reads keep_mounted.
func (c Config) linger() (time.Duration, error) {
	d, err := time.ParseDuration(c.KeepMounted)
	if err != nil || d < 0 || d > lingerMost {
		return 0, fmt.Errorf("keep_mounted = %q: want a time from \"0s\" to \"1h\", such as \"30s\"", c.KeepMounted)
	}
	return d, nil
}
