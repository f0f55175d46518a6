// Two buttons that need no server: the conversation as a file, and light or dark.
"use strict";

function download() {
  const field = document.querySelector("#medgpt-conversation textarea, #medgpt-conversation input");
  if (!field || !field.value) return;
  const address = URL.createObjectURL(new Blob([field.value + "\n"], { type: "application/json" }));
  const link = document.createElement("a");
  link.href = address;
  link.download = "conversation.json";
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

document.addEventListener("click", (event) => {
  if (event.target.closest("#medgpt-download")) download();
  if (event.target.closest("#medgpt-theme")) document.body.classList.toggle("dark");
});
