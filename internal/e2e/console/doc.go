// Package console tries the web console in a real browser.
package console
