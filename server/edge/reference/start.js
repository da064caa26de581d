"use strict";
const dark = matchMedia("(prefers-color-scheme: dark)");
const shade = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", shade);
shade();

// What Swagger UI leaves to be wished for by those who use a keyboard or a screen reader: headings
// that follow one another, names for what has only a picture, and boxes of code that can be scrolled.
function mend() {
  for (const one of document.querySelectorAll("h3.opblock-tag:not([aria-level]), .models > h4:not([aria-level]), .modal-ux-header > h3:not([aria-level])")) one.setAttribute("aria-level", "2");
  for (const one of document.querySelectorAll(".opblock h4:not([aria-level]), .modal-ux h4:not([aria-level])")) one.setAttribute("aria-level", "3");
  for (const one of document.querySelectorAll(".opblock h5:not([aria-level])")) one.setAttribute("aria-level", "4");
  for (const one of document.querySelectorAll(".copy-to-clipboard > button:not([aria-label])")) one.setAttribute("aria-label", "Copy");
  for (const one of document.querySelectorAll(".close-modal:not([aria-label])")) one.setAttribute("aria-label", "Close");
  for (const one of document.querySelectorAll(".auth-btn-wrapper button[aria-label]")) one.removeAttribute("aria-label"); // other words than its own
  for (const one of document.querySelectorAll("textarea:not([aria-label])")) one.setAttribute("aria-label", "Request body");
  for (const one of document.querySelectorAll("pre:not([tabindex]), .microlight:not([tabindex])")) one.setAttribute("tabindex", "0");
}
new MutationObserver(mend).observe(document.getElementById("reference"), { childList: true, subtree: true });

SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#reference",
  deepLinking: false, // its links stand inside of buttons
  defaultModelsExpandDepth: 0,
  displayRequestDuration: true,
  persistAuthorization: false,
  validatorUrl: null,
});
