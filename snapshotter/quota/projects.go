package quota

import (
	"errors"
	"fmt"
	"hash/fnv"
	"strconv"
	"strings"
	"sync"
)

// Range is the projects from First to Last.
type Range struct{ First, Last Project }

// DefaultRange is far from what others count up from: the ids in /etc/projid, the kubelet (1,048,577) and Docker (the
// project of its directory).
var DefaultRange = Range{2_000_000_000, 2_000_999_999}

// ParseRange reads "first-last".
func ParseRange(text string) (Range, error) {
	first, last, _ := strings.Cut(text, "-")
	from, err := strconv.ParseUint(first, 10, 32)
	to, terr := strconv.ParseUint(last, 10, 32)
	// The kernel takes the last number of all for none.
	if err := errors.Join(err, terr); err != nil || from == 0 || to < from || to == 1<<32-1 {
		return Range{}, fmt.Errorf(`want two project ids from 1 to 4294967294, such as "%s"`, DefaultRange)
	}
	return Range{Project(from), Project(to)}, nil
}

func (r Range) String() string { return fmt.Sprintf("%d-%d", r.First, r.Last) }

// Has reports whether p is one of the range.
func (r Range) Has(p Project) bool { return p >= r.First && p <= r.Last }

// Projects gives out the ids of a range, each to one user at a time. Safe for concurrent use.
type Projects struct {
	in   Range
	idle func(Project) (bool, error)

	mu   sync.Mutex // guards what follows
	used map[Project]bool
	next Project
}

// NewProjects gives out ids of a range. idle asks the kernel: ids that others use, or that files of a former user still
// have, are skipped. Each seed begins elsewhere, so that two stores on one file system do not ask for the same id at
// the same moment.
func NewProjects(in Range, seed string, idle func(Project) (bool, error)) *Projects {
	h := fnv.New32a()
	_, _ = h.Write([]byte(seed)) // never fails
	size := in.Last - in.First + 1
	return &Projects{in: in, idle: idle, used: map[Project]bool{}, next: in.First + Project(h.Sum32())%size}
}

// Take returns an id that nobody uses.
func (ps *Projects) Take() (Project, error) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for range uint64(ps.in.Last-ps.in.First) + 1 {
		p := ps.next
		if ps.next++; ps.next > ps.in.Last {
			ps.next = ps.in.First
		}
		if ps.used[p] {
			continue
		}
		idle, err := ps.idle(p)
		if err != nil {
			return 0, err
		}
		if idle {
			ps.used[p] = true
			return p, nil
		}
	}
	return 0, fmt.Errorf("no project id of %s is free: set project_ids to a larger range, or remove containers", ps.in)
}

// Keep notes that an id is in use.
func (ps *Projects) Keep(p Project) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.used[p] = true
}

// Free takes an id back.
func (ps *Projects) Free(p Project) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	delete(ps.used, p)
}
