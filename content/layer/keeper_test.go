package layer

import (
	"testing"
	"time"
)

func TestBackoff(t *testing.T) {
	const most = 8 * time.Hour
	b := newBackoff(3*time.Hour, most)
	defer b.timer.Stop()
	for i, step := range []struct {
		do   func()
		want time.Duration
	}{
		{func() {}, 3 * time.Hour},
		{b.next, 6 * time.Hour},
		{b.next, most},
		{b.next, most},
		{func() { b.within(time.Hour) }, time.Hour},
		{b.next, 2 * time.Hour},
		{func() { b.within(5 * time.Hour) }, 2 * time.Hour}, // it is sooner anyway
		{b.next, 4 * time.Hour},
	} {
		step.do()
		left := time.Until(b.at)
		if b.gap != step.want || left > step.want || left < step.want-time.Minute {
			t.Errorf("step %d: %v, in %v, want %v", i, b.gap, left, step.want)
		}
	}
}
