package quota

import (
	"errors"
	"strings"
	"sync"
	"testing"
)

func TestParseRange(t *testing.T) {
	for text, want := range map[string]Range{
		"1-1": {1, 1}, "2000000000-2000999999": DefaultRange, "7-4294967294": {7, 4294967294},
	} {
		if got, err := ParseRange(text); got != want || err != nil {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "5", "0-9", "9-8", "1-4294967295", "1-2-3", "a-b", "-1-5", "1-99999999999",
		"1 - 2"} {
		if got, err := ParseRange(text); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
}

// No id has two users, ids that the kernel knows to be in use are skipped, and all come round again.
func TestProjects(t *testing.T) {
	in := Range{10, 29}
	busy := map[Project]bool{12: true, 13: true}
	ps := NewProjects(in, "seed", func(p Project) (bool, error) { return !busy[p], nil })
	ps.Keep(20)
	ps.Keep(3) // of a range of before
	var mu sync.Mutex
	var wg sync.WaitGroup
	taken := map[Project]int{}
	for range 17 {
		wg.Go(func() {
			p, err := ps.Take()
			mu.Lock()
			defer mu.Unlock()
			if taken[p]++; err != nil || !in.Has(p) || busy[p] || p == 20 || taken[p] > 1 {
				t.Errorf("%d for the %dth time, %v", p, taken[p], err)
			}
		})
	}
	wg.Wait()
	if p, err := ps.Take(); err == nil || !strings.Contains(err.Error(), "project_ids") {
		t.Errorf("one more: %d, %v", p, err)
	}
	ps.Free(15)
	if p, err := ps.Take(); p != 15 || err != nil {
		t.Errorf("after one was freed: %d, %v", p, err)
	}
	delete(busy, 13)
	if p, err := ps.Take(); p != 13 || err != nil {
		t.Errorf("after one is idle: %d, %v", p, err)
	}
}

// Two stores begin at different ids, and an error of the kernel is passed on.
func TestProjectsSeed(t *testing.T) {
	idle := func(Project) (bool, error) { return true, nil }
	a, aerr := NewProjects(DefaultRange, "/var/lib/a", idle).Take()
	b, berr := NewProjects(DefaultRange, "/var/lib/b", idle).Take()
	if err := errors.Join(aerr, berr); a == b || !DefaultRange.Has(a) || !DefaultRange.Has(b) || err != nil {
		t.Errorf("%d and %d, %v", a, b, err)
	}
	broken := errors.New("broken")
	ps := NewProjects(Range{1, 4294967294}, "", func(Project) (bool, error) { return false, broken })
	if _, err := ps.Take(); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
}
