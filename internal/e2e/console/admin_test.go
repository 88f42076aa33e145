package console

import (
	"io"
	"os"
	"strings"
	"testing"

	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"github.com/dunlin/dunlin/agent"
)

// What an empty fleet says to run names this controller, and the alarms of a
// fleet are found and read.
func TestAlarms(t *testing.T) {
	w := start(t)
	b := open(t)
	var command string
	b.do(t, chromedp.Navigate(w.URL+"/"), chromedp.SendKeys("#name", "ada"), chromedp.SendKeys("#password", password+"\r"), chromedp.WaitVisible(".empty"),
		chromedp.Text(".empty .command:last-of-type code", &command))
	_, port, _ := strings.Cut(strings.TrimPrefix(w.DeviceURL, "https://"), ":")
	words := strings.Fields(command)
	t.Chdir(t.TempDir())
	must(t, os.WriteFile("join-token", []byte("the-token\n"), 0o600))
	c, err := agent.ParseConfig(words[1:], func(string) string { return "" }, io.Discard)
	if err != nil || words[0] != "dunlin-agent" || !strings.HasPrefix(c.Controller, "https://") || !strings.HasSuffix(c.Controller, ":"+port) || c.JoinToken != "the-token" {
		t.Errorf("got %q (%v), the controller is at %s", command, err, w.DeviceURL)
	}
	w.fill(t)
	b.do(t, chromedp.Navigate(w.URL+"/alarms"), chromedp.WaitVisible(".alarm .spark"))
	for _, theme := range []string{"light", "dark"} {
		b.do(t, chromedp.Click(`button[value=`+theme+`]`), chromedp.WaitVisible(`html[data-theme=`+theme+`] .alarm .spark`))
		b.clean(t, "alarms, "+theme)
		b.picture(t, "alarms-"+theme)
	}
	// By keyboard, to one that is not there and back.
	var at string
	b.do(t, chromedp.KeyEvent("/"), chromedp.WaitVisible("#q:focus"), chromedp.KeyEvent(kb.Backspace), chromedp.KeyEvent("nothing\r"), chromedp.WaitVisible(".none"), chromedp.Location(&at))
	if at != w.URL+"/alarms?q=nothing" {
		t.Errorf("got %s", at)
	}
	b.clean(t, "no alarm found")
	b.do(t, chromedp.Click(".clear"), chromedp.WaitVisible(".alarm.error details"), chromedp.Click(".alarm details summary"), chromedp.WaitVisible(".alarm details[open] td"))
	b.clean(t, "samples")
}
