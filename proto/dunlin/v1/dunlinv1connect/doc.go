// Package dunlinv1connect holds clients and handlers of the controller's API.
package dunlinv1connect
