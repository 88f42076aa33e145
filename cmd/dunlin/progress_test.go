package main

import (
	"bytes"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestProgressLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		p := newProgress(&out, false, "push")
		p.total = 100 << 20
		stop := p.run()
		p.reuse(20 << 20)
		time.Sleep(500 * time.Millisecond)
		for range 13 {
			time.Sleep(time.Second)
			p.add(5 << 20)
		}
		time.Sleep(3 * time.Second)
		p.add(15 << 20)
		p.finish()
		stop()
		want := `push: 40.0 MiB of 100.0 MiB, 4.0 MiB/s, 15s left, 20.0 MiB reused
push: 65.0 MiB of 100.0 MiB, 4.5 MiB/s, 7.8s left, 20.0 MiB reused
push: 85.0 MiB of 100.0 MiB, 4.3 MiB/s, 3.5s left, 20.0 MiB reused
push: 80.0 MiB sent in 16s (4.8 MiB/s), 20.0 MiB reused
`
		if got := out.String(); got != want {
			t.Errorf("got\n%swant\n%s", got, want)
		}
	})
}

func TestProgressLive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		p := newProgress(&out, true, "push")
		p.total = 2048
		stop := p.run()
		time.Sleep(liveInterval / 2)
		p.add(1024)
		time.Sleep(liveInterval)
		stop() // it failed
		got := out.String()
		if strings.Count(got, "\r") != 1 || strings.Count(got, "\n") != 1 || !strings.HasSuffix(got, "left\x1b[K\n") {
			t.Errorf("got %q", got)
		}
	})
}

func TestTexts(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1<<20 - 1: "1.0 MiB", 1 << 20: "1.0 MiB", 5 << 30: "5.0 GiB", 1<<63 - 1: "8.0 EiB"} {
		if got := bytesText(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{
		0: "0.0s", 1500 * time.Millisecond: "1.5s", 12 * time.Second: "12s", 185 * time.Second: "3m05s", 130 * time.Minute: "2h10m", 75 * time.Hour: "3d",
	} {
		if got := durationText(d); got != want {
			t.Errorf("%s: %q, want %q", d, got, want)
		}
	}
}
