package main

import (
	"net"
	"strings"
	"testing"
	"time"
)

// Profiles are served while the daemon runs, on the address that is asked for.
func TestPprof(t *testing.T) {
	c := testConfig(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.PprofAddress = l.Addr().String()
	l.Close()
	stop := start(t, c)
	for range 6000 { // the socket is there before all else
		if conn, err := net.Dial("tcp", c.PprofAddress); err == nil {
			conn.Close()
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	url := "http://" + c.PprofAddress + "/debug/pprof/"
	if text := fetch(t, url+"goroutine?debug=1"); !strings.Contains(text, "(*Store).keep") {
		t.Errorf("the store's keeper is in no goroutine: %s", text)
	}
	if heap := fetch(t, url+"heap"); len(heap) == 0 {
		t.Error("the heap's profile is empty")
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if conn, err := net.Dial("tcp", c.PprofAddress); err == nil {
		conn.Close()
		t.Error("it is served after the stop")
	}
}

func TestPprofAddress(t *testing.T) {
	for address, ok := range map[string]bool{
		"127.0.0.1:9742": true, "127.1.2.3:1": true, "[::1]:9742": true, "[::ffff:127.0.0.1]:9742": true,
		"0.0.0.0:9742": false, "[::]:9742": false, "10.0.0.1:9742": false,
		":9742": false, "localhost:9742": false, "127.0.0.1": false,
	} {
		if err := checkPprofAddress(address); (err == nil) != ok {
			t.Errorf("%s: %v", address, err)
		}
	}
}
