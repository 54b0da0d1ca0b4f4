package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// What the verbs that print lists have in common.

func sortFlag[T any](orders map[string]func(a, b T) int, first string) cli.Flag {
	keys := strings.Join(slices.Sorted(maps.Keys(orders)), ", ")
	return &cli.StringFlag{Name: "sort", Usage: "sort by `KEY`: " + keys, Value: first}
}

func orderOf[T any](c *cli.Context, orders map[string]func(a, b T) int) (func(a, b T) int, error) {
	order, ok := orders[c.String("sort")]
	if !ok {
		return nil, usageError{unknown("sort key", c.String("sort"), slices.Sorted(maps.Keys(orders)))}
	}
	return order, nil
}

// largest puts what is largest first.
func largest[T any](of func(T) int64) func(a, b T) int {
	return func(a, b T) int { return cmp.Compare(of(b), of(a)) }
}

// none says why a list is empty, apart from the list: of those that there are, none passed the filters.
func none(c *cli.Context, what string, all int) {
	if all == 0 {
		fmt.Fprintf(c.App.ErrWriter, "no %ss: nothing has been pulled with the snapshotter dedup "+
			"(see dedupctl config containerd)\n", what)
		return
	}
	fmt.Fprintf(c.App.ErrWriter, "no %s matches; there are %s in all\n", what, count(int64(all)))
}
