package powercut

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// noted is an event, and how many operations the disk had seen when it came.
type noted struct {
	at int
	event
}

// world is what clients know, over time.
type world []noted

// of is the history of one name.
func (w world) of(name string) string {
	var b strings.Builder
	for _, e := range w {
		if e.Snapshot.Name == name {
			fmt.Fprintf(&b, "%s at %d; ", e.Kind, e.at)
		}
	}
	return b.String()
}

// state is what clients know at one moment.
type state struct {
	now   int                 // operations that the disk had seen
	told  map[string]int      // when clients were told that a snapshot is there
	have  map[string]snapshot // is there
	going map[string]snapshot // may be there
	doing map[int]snapshot    // may be there

	trimmed map[string]bool // no blob of its layer may be left
}

// at returns what clients knew when the disk had seen n operations.
func (w world) at(n int) state {
	s := state{n, map[string]int{}, map[string]snapshot{}, map[string]snapshot{}, map[int]snapshot{}, map[string]bool{}}
	for _, e := range w {
		if e.at > n {
			break
		}
		name := e.Snapshot.Name
		switch e.Kind {
		case "doing":
			s.doing[e.Op] = e.Snapshot
		case "done":
			delete(s.doing, e.Op)
			if _, served := s.have[name]; !served { // the same hit again
				s.have[name], s.told[name] = e.Snapshot, e.at
			}
		case "removing":
			s.going[name] = s.have[name]
			delete(s.have, name)
		case "kept":
			s.have[name] = s.going[name]
			delete(s.going, name)
		case "removed":
			delete(s.going, name)
		case "trimmed":
			s.trimmed[name] = true
		}
	}
	return s
}

// since is for how long a snapshot has been there.
func (s state) since(name string) int {
	if told, ok := s.told[name]; ok {
		return s.now - told
	}
	return 0
}

// durable reports that a snapshot and all below it have to be whole, whatever the durability.
func (s state) durable(name string) bool {
	for name != "" {
		if !s.trimmed[name] {
			return false
		}
		name = s.have[name].Parent
	}
	return true
}

// settle decides what may be there by what is there: names, of the snapshots found. w is for messages.
func (s state) settle(w world, names []string) (problems []string) {
	found := map[string]bool{}
	for _, name := range names {
		found[name] = true
		if _, ok := s.have[name]; ok {
			continue
		}
		if sn, ok := s.going[name]; ok {
			s.have[name] = sn
			continue
		}
		if !s.adopt(name) {
			problems = append(problems, fmt.Sprintf("%s is there, and nobody made it, or it was removed (%s)", name, w.of(name)))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.have)) {
		if !found[name] {
			problems = append(problems, fmt.Sprintf("%s was acknowledged, and is gone (%s)", name, w.of(name)))
		}
	}
	return problems
}

// adopt takes a name for what was under way.
func (s state) adopt(name string) bool {
	for op, sn := range s.doing {
		if sn.Name == name || sn.Suffix != "" && strings.HasSuffix(name, sn.Suffix) &&
			strings.HasPrefix(name, sn.Client+"/") {
			sn.Name = name
			s.have[name] = sn
			delete(s.doing, op)
			return true
		}
		// What a client is filling: an extraction, or the directory that it is about to commit.
		if key := name[strings.LastIndexByte(name, '/')+1:]; strings.HasPrefix(key, "extract-") || name == sn.Name+"-active" {
			return true
		}
	}
	return strings.Contains(name, "/view-")
}

// chain returns a snapshot and all below it, base first.
func (s state) chain(name string) (chain []snapshot) {
	for name != "" {
		sn := s.have[name]
		chain = append(chain, sn)
		name = sn.Parent
	}
	slices.Reverse(chain)
	return chain
}
