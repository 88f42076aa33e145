package main

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/dunlin/dunlin/internal/e2e"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == bareCommand {
		if err := bareBroker(os.Args[2:], os.Stdin, os.Stdout); err != nil {
			panic(err)
		}
		return
	}
	os.Exit(m.Run())
}

// TestMeasure is a short run: it holds what the figures take for granted.
func TestMeasure(t *testing.T) {
	root, err := e2e.Root()
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	programs, err := e2e.Build(t.Context(), root, dir)
	if err != nil {
		t.Fatal(err)
	}
	f, err := measure(t.Context(), size{devices: 100, idle: time.Second, quiet: time.Second}, programs, self, root, filepath.Join(dir, "fleet"), t.Output())
	if err != nil {
		t.Fatal(err)
	}
	f.print(t.Output())
	for _, s := range []spread{f.fanout, f.serving, f.known, f.bare} {
		if s.p50 <= 0 || s.p99 < s.p50 || s.all < s.p99 {
			t.Errorf("a spread of %v", s)
		}
	}
	if f.join <= 0 || f.connect <= 0 || f.reconnect <= 0 || f.cpu <= 0 || f.memory <= 0 || f.serving.p50 < f.fanout.p50 || f.known.p50 < f.serving.p50 {
		t.Errorf("measured %+v", f)
	}
	idle, err := measureIdle(t.Context(), idleSize{devices: 3, duration: time.Second}, programs, root, filepath.Join(dir, "idle"), t.Output())
	if err != nil {
		t.Fatal(err)
	}
	idle.print(t.Output())
	if idle.opened != 0 || idle.most.bytes() < idle.device.bytes() {
		t.Errorf("counted %+v", idle)
	}
}

func TestMeter(t *testing.T) {
	l, err := net.Listen("tcp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	var m meter
	stop, err := m.pass(t.Context(), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	say := func(c net.Conn, n int) {
		t.Helper()
		if _, err := c.Write(make([]byte, n)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, n)); err != nil {
			t.Fatal(err)
		}
	}
	open := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", net.JoinHostPort(gateway, port))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	first := open()
	defer first.Close()
	say(first, 100)
	before := m.read()
	say(first, 1)
	second := open()
	defer second.Close()
	say(second, 1000)
	sum, most, opened := m.since(before)
	if sum.sent != 1001 || sum.received != 1001 || most.sent != 1000 || most.received != 1000 || sum.messages < 4 || opened != 1 {
		t.Errorf("counted %+v, of one %+v, %d opened", sum, most, opened)
	}
}
