package main

import (
	"slices"
	"testing"
)

// An image that only lacks what others bring comes after them; one that lacks more, or in another namespace, does not
// come.
func TestMigrationOrder(t *testing.T) {
	image := func(namespace, name, state string, chains, missing []string) *stack {
		return &stack{MigrationImage: MigrationImage{Namespace: namespace, Names: []string{name}, State: state,
			BlobBytes: 10}, chains: chains, missing: missing}
	}
	m := &migration{stacks: []*stack{
		image("a", "behind", stateIncomplete, []string{"1", "2", "3"}, []string{"2"}),
		image("a", "next", stateIncomplete, []string{"1", "2"}, []string{"1"}),
		image("a", "lacks", stateIncomplete, []string{"1", "9"}, []string{"9"}),
		image("b", "elsewhere", stateIncomplete, []string{"1"}, []string{"1"}),
		image("a", "whole", stateMigrate, []string{"1"}, nil),
		image("a", "there", statePresent, []string{"5"}, nil),
		image("a", "broken", stateFailed, nil, nil),
	}}
	m.order()
	var got []string
	for _, s := range m.stacks {
		got = append(got, s.Names[0]+": "+s.State)
	}
	want := []string{"whole: to migrate", "there: present", "next: to migrate", "behind: to migrate", "lacks: incomplete",
		"elsewhere: incomplete", "broken: failed"}
	if !slices.Equal(got, want) || m.total != 30 {
		t.Errorf("%q, %d bytes; want %q", got, m.total, want)
	}
}
